"""GGUF files of tiny models, written with the gguf package as llama.cpp's converter writes them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

CONTROL, NORMAL = 3, 1  # kinds of tokens


def save_gguf(path: Path, model, tokenizer, quantization: str = "F32", **changes: Any) -> Path:
    """Writes `model` and `tokenizer` to a GGUF file. Norms stay in float32, as llama.cpp leaves them.

    `changes` replace what is written: `architecture`, `pre`, `eos`, `eot`, `template`; `fields` and `tensors` are more.
    """
    config = model.config
    architecture = {"gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, changes.get("architecture", architecture))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    add_tokenizer(writer, tokenizer, config.vocab_size, changes)
    for name, value in changes.get("fields", {}).items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](name, value)
    for name, array in (tensors(model, architecture) | changes.get("tensors", {})).items():
        kind = gguf.GGMLQuantizationType[quantization if array.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer, tokenizer, size: int, changes: dict[str, Any]) -> None:
    import json

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["id"] for token in state["added_tokens"]}
    tokens = tokenizer.convert_ids_to_tokens(range(size))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if i in special else NORMAL for i in range(size)])
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids(changes.get("eos", tokenizer.eos_token)))
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if "eot" in changes:
        writer.add_eot_token_id(tokenizer.convert_tokens_to_ids(changes["eot"]))
    if template := changes.get("template", tokenizer.chat_template):
        writer.add_chat_template(template)


def tensors(model, architecture: str) -> dict[str, np.ndarray]:
    """The weights under GGUF's names and in its layout: Llama's heads interleaved, Gemma's norms counted from one."""
    config = model.config
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found = {}
    for full, tensor in model.state_dict().items():
        if full == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name, _, ending = full.rpartition(".")
        array = tensor.float().numpy()
        if architecture == "llama" and name.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if name.endswith("q_proj") else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if architecture == "gemma3" and name.endswith("norm"):
            array = array + 1
        found[f"{names.get_name(name)}.{ending}"] = np.ascontiguousarray(array)
    return found
