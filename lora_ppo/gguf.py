"""GGUF files, in which llama.cpp, Ollama and LM Studio keep models, as folders of safetensors.

A file is dequantized once, by transformers, and what comes out is kept in the user's cache folder: the next start is as
quick as from safetensors, and 4 bits are made of it as of any folder. What transformers leaves out is added here (every
end token, scaled positions, the size of a head, digits that stand apart); a file that it would read wrongly is refused.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_ppo.files import cache_folder
from lora_ppo.settings import ConfigError

FORMAT = 1  # of what is cached; with another number every file is dequantized anew
# Control tokens that end a reply, whichever the file names; the list is llama.cpp's, as is the other, by `pre`.
ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
INSTEAD = "name a folder of safetensors, or another file"


@contextlib.contextmanager
def unpacked(path: Path, dtype: str) -> Iterator[Path]:
    """The folder of the model in a GGUF file, in `dtype`: from the cache, or dequantized now. Raises ConfigError.

    Where the cache can't be written, it is a temporary folder, there for as long as the context lasts.
    """
    from safetensors import SafetensorError

    kept = cache_folder() / cache_name(path, dtype)
    with contextlib.ExitStack() as stack:
        if not kept.is_dir():
            model, tokenizer = dequantize(path, dtype)
            try:
                for other in kept.parent.glob("*"):  # what an earlier file in its place became
                    if other.name.startswith(kept.name.rpartition("-")[0]) and other != kept:
                        shutil.rmtree(other, ignore_errors=True)
                write_folder(kept, model, tokenizer)
            except (OSError, SafetensorError):
                try:
                    kept = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
                    write_folder(kept, model, tokenizer)
                except (OSError, SafetensorError) as error:
                    raise ConfigError(
                        f"model_name={path} can't be unpacked, neither in {cache_folder()} nor in {kept.parent} "
                        f"({error}): set XDG_CACHE_HOME to a folder with room"
                    ) from None
            del model
        yield kept


def cache_name(path: Path, dtype: str) -> str:
    """`name-file-state`: the last part changes with the file's size and date, and with what reads it."""
    import transformers

    def short(*parts: Any) -> str:
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    file, status = str(path.resolve()), path.stat()
    state = short(status.st_size, status.st_mtime_ns, transformers.__version__, FORMAT)
    return f"{path.stem}-{short(file, dtype)}-{state}"


def write_folder(folder: Path, model, tokenizer, others: dict[str, bytes] | None = None) -> None:
    """Writes model, tokenizer and other files by name to `folder`: all of it, or nothing.

    What another process has put there meanwhile stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        new = Path(place) / folder.name
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        for name, content in (others or {}).items():
            (new / name).write_bytes(content)
        os.sync()
        try:
            new.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def dequantize(path: Path, dtype: str):
    """The model in a GGUF file, in `dtype` on the CPU, and its tokenizer. Raises ConfigError."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    reader = read(path)
    with tempfile.TemporaryDirectory() as place:  # alone in a folder: no neighbour is taken for its config
        link = Path(place) / "model.gguf"
        link.symlink_to(path.resolve())
        source = {"pretrained_model_name_or_path": place, "gguf_file": str(link), "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(**source)
        except Exception:
            known = ", ".join(sorted({*GGUF_SUPPORTED_ARCHITECTURES} - {"general", "tokenizer"}))
            raise ConfigError(
                f"model_name={path} has the architecture {field(reader, 'general.architecture')!r}, which can't be "
                f"read from GGUF (expected one of {known}): {INSTEAD}"
            ) from None
        complete(config, reader, path)
        options = {"config": config, "dtype": getattr(torch, dtype), "quantization_config": GgufConfig(dequantize=True)}
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            model, found = AutoModelForCausalLM.from_pretrained(**source, **options, output_loading_info=True)
    # A weight that no layer takes, or a layer without weights, and the model would run and write nonsense.
    beyond = f"blk.{config.get_text_config().num_hidden_layers}."  # a block that predicts two tokens ahead
    stored = sum(int(t.n_elements) for t in reader.tensors if not t.name.startswith(("rope_", beyond)))
    taken = sum(parameter.numel() for parameter in model.parameters())
    if stored != taken or found["missing_keys"]:
        raise ConfigError(
            f"model_name={path} holds {stored:,} weights, and as transformers reads it, as {config.model_type}, it "
            f"would have {taken:,}: {INSTEAD}"
        )
    tokenizer = read_tokenizer(path)
    model.generation_config.eos_token_id = end_ids(reader, tokenizer)
    return model, tokenizer


def read(path: Path):
    """The file's fields and tensors, the latter not read yet. Raises ConfigError for what is no whole GGUF file."""
    from gguf import GGUFReader

    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ConfigError(
            f"model_name={path} is no GGUF file (it begins with {magic!r}, expected {b'GGUF'!r}): "
            "name a GGUF file, a model folder, or a model on the hub"
        )
    try:
        reader = GGUFReader(path)
        parts = field(reader, "split.count") or 1
        reader.fields["general.architecture"]
    except Exception:  # numpy's, enum's and others, from where the bytes end or make no sense
        raise ConfigError(
            f"model_name={path} is cut off or damaged: it has {path.stat().st_size:,} bytes, and its header "
            "asks for more or makes no sense; get the file again"
        ) from None
    if parts > 1:
        raise ConfigError(
            f"model_name={path} is one of {parts} parts, expected a whole model: join them with "
            "`llama-gguf-split --merge`, and name the result"
        )
    return reader


def field(reader, name: str) -> Any:
    """A field of the file; None where it has none of that name."""
    found = reader.get_field(name)
    return None if found is None else found.contents()


def complete(config, reader, path: Path) -> None:
    """Sets in `config` what transformers does not take from the file. Raises ConfigError for unknown positions."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    architecture, text = field(reader, "general.architecture"), config.get_text_config()
    if architecture == "qwen3":
        text.head_dim = field(reader, "qwen3.attention.key_length") or text.head_dim
    if architecture in ("gemma2", "gemma3") and text.head_dim == 128:  # those of 27 B; no field says so
        text.query_pre_attn_scalar = text.hidden_size // text.num_attention_heads
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    scaling = (field(reader, f"{architecture}.rope.scaling.{name}") for name in ("type", "factor"))
    kind, factor = scaling
    tables = {t.name: torch.tensor(t.data) for t in reader.tensors if t.name.startswith("rope_")}
    if tables.keys() == {"rope_freqs.weight"}:  # Llama 3.1 and later, which differ in one number: what divides most
        [divisors] = tables.values()
        rope |= {"rope_type": "llama3", "factor": divisors.max().item(), "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        wanted = rope["rope_theta"] ** -(torch.arange(len(divisors)) / len(divisors)) / divisors
        found, _ = ROPE_INIT_FUNCTIONS["llama3"](text, torch.device("cpu"))
        understood = found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4)
    else:
        understood = not tables and (kind in (None, "none") or (kind in ("linear", "yarn") and factor is not None))
    if not understood:
        raise ConfigError(
            f"model_name={path} scales its positions in a way that can't be read from GGUF ({kind or 'by a table'}; "
            f"expected none, linear, yarn, or Llama 3's): {INSTEAD}"
        )
    if not tables and factor is not None and kind != "none":
        length = field(reader, f"{architecture}.rope.scaling.original_context_length") or text.max_position_embeddings
        rope |= {"rope_type": kind, "factor": factor}
        rope |= {"original_max_position_embeddings": length} if kind == "yarn" else {}


def read_tokenizer(path: Path):
    """The file's own tokenizer, whatever others of its architecture use, with its chat template."""
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, parts, options = get_gguf_tokenizer(str(path))
    backend, _ = convert_gguf_tokenizer(architecture, parts)
    if parts.get("pre_tokenizer_type") in DIGITS_APART:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    state, tokens = json.loads(backend.to_str()), {*parts["tokens"]}
    # transformers adds <|endoftext|> where there is none; for the model it would be a token without an embedding.
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < len(parts["tokens"])]
    if state["model"].get("unk_token") not in tokens and "unk_token" in state["model"]:
        state["model"]["unk_token"] = None
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **options)


def end_ids(reader, tokenizer) -> list[int] | None:
    """Every token that ends a reply: those that the file names, then those that are known by their text."""
    named = [field(reader, f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    known = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = [i for i in (*named, *(known.get(text) for text in ENDS)) if i is not None]
    return list(dict.fromkeys(ids)) or None
