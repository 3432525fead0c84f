"""Verifies a model of 12 layers in a process of its own and prints how far its memory grew.

Nothing here holds the model: the source draws each tensor when it is read, and the files are
written layer by layer. Prints: passed, bytes grown, bytes of the weights in fp32, bytes of a layer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_mup import platform

platform.prepare()

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from megatron_mup.config import ModelConfig  # noqa: E402
from megatron_mup.convert.formats import HfFormat, hf_name  # noqa: E402
from megatron_mup.convert.huggingface_config import config_dict  # noqa: E402
from megatron_mup.convert.verification import verify_export  # noqa: E402
from megatron_mup.convert.verification_text import CheckedTokens  # noqa: E402
from megatron_mup.parameterization.roles import logical_tensors  # noqa: E402
from tests.convert.memory_weights import DrawnWeights, small_model  # noqa: E402


def peak_bytes() -> int:
    """Not ``ru_maxrss``, which a program inherits from the one that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line)


def verify(model: ModelConfig, folder: Path) -> bool:
    source = DrawnWeights(model)
    folder.mkdir()
    weight_map = {}
    for number, tensor in enumerate(logical_tensors(model.shape)):
        file, name = f"part-{number}.safetensors", hf_name(tensor)
        save_file({name: source.read(tensor.name).bfloat16()}, folder / file)
        weight_map[name] = file
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    config = config_dict(HfFormat.GRANITE, model, source.multipliers, dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(config))
    ids = torch.arange(32).view(2, 16)
    tokens = CheckedTokens(ids=ids, origin="counting")
    return verify_export(source, folder, tokens=tokens, exported=source).passed


def main(folder: Path) -> None:
    # Imports, lazy ones too, belong to every process.
    assert verify(small_model(), folder / "first")
    before = peak_bytes()
    model = small_model(num_layers=12, hidden_size=384, ffn_hidden_size=1536)
    passed = verify(model, folder / "second")
    grown = peak_bytes() - before
    sizes = {t.name: 4 * torch.Size(t.shape).numel() for t in logical_tensors(model.shape)}
    layer = sum(size for name, size in sizes.items() if ".layers.3." in name)
    sys.stdout.write(f"{passed} {grown} {sum(sizes.values())} {layer}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
