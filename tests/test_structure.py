"""The rules that keep the project small and its layers apart. CONTRIBUTING.md says why."""

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# In order: a folder imports itself and the ones before it.
LAYERS = ("kernels", "moe", "parallel", "launch")
PACKAGES = (*LAYERS, "recipes")

# What a folder may not import, by dotted prefix.
HYDRA = ("hydra", "omegaconf")
FORBIDDEN = {
    "moe": ("torch.distributed", "deepspeed", "wandb", *HYDRA),
    "parallel": ("wandb", *HYDRA),
    "launch": ("deepspeed",),
}
KERNELS_MAY_IMPORT = ("torch", "triton", "moesaic.kernels")

# Import names of dependencies that may be missing here, those of optional extras included.
OPTIONAL_MODULES = {
    "accelerate", "datasets", "deepspeed", "evaluate", "huggingface_hub", "kernels", "lm_eval", "matplotlib", "moe",
    "parallel", "pyarrow", "recipes", "tqdm",
    "rich", "safetensors", "tokenizers", "torch", "transformers", "triton", "wandb",
}  # fmt: skip

FILE_BUDGET = 600
TOTAL_BUDGET = 30_000


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(code: str) -> Iterator[str]:
    """Dotted names that a module imports, or reaches through a name it imported.

    `from a import b` gives a.b, for b may be a module; `import torch` and then `torch.distributed.x` gives torch.distributed.x.
    """
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            parts = [node.attr]
            value = node.value
            while isinstance(value, ast.Attribute):
                parts.append(value.attr)
                value = value.value
            if isinstance(value, ast.Name) and value.id == "torch":
                yield ".".join(["torch", *reversed(parts)])


def under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def broken_rules(folder: str, name: str) -> str | None:
    """Why a module in `folder` may not import `name`, or None."""
    if name.startswith("."):
        return "imports are written in full, from moesaic"
    if under(name, PACKAGES):
        return f"it is imported as moesaic.{name}"
    if under(name, ("moesaic",)):
        # Nothing but the version lies in moesaic itself.
        layer = name.split(".")[1] if "." in name else ""
        if layer not in LAYERS[: LAYERS.index(folder) + 1]:
            return f"imports point one way: {' <- '.join(LAYERS)}"
    if under(name, FORBIDDEN.get(folder, ())):
        return f"{folder}/ does without it"
    if (
        folder == "kernels"
        and name.split(".")[0] not in sys.stdlib_module_names
        and not under(name, KERNELS_MAY_IMPORT)
    ):
        return "kernels/ imports torch and triton only"
    return None


def test_imports_point_one_way():
    found = [
        f"{path.relative_to(ROOT)} imports {name}: {why}"
        for folder in LAYERS
        for path in sources(folder)
        for name in imports(path.read_text())
        if (why := broken_rules(folder, name))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("folder", "code"),
    [
        ("kernels", "from moesaic.moe import router"),
        ("kernels", "import numpy"),
        ("moe", "import moesaic.parallel.mesh"),
        ("moe", "from moesaic import parallel"),
        ("moe", "import torch.distributed as dist"),
        ("moe", "from torch import distributed"),
        ("moe", "import torch\ntorch.distributed.barrier()"),
        ("moe", "import hydra"),
        ("parallel", "from moesaic.launch.schema import Config"),
        ("parallel", "def f():\n    from omegaconf import OmegaConf"),
        ("launch", "import deepspeed"),
        ("launch", "from moe import model"),
        ("launch", "from . import schema"),
    ],
)
def test_a_forbidden_import_is_seen(folder, code):
    assert any(broken_rules(folder, name) for name in imports(code))


@pytest.mark.parametrize(
    ("folder", "code"),
    [
        ("kernels", "import math\nimport triton.language as tl\nfrom moesaic.kernels.topk import topk"),
        ("moe", "import torch\nfrom moesaic.kernels import topk\ntorch.nn.functional.silu"),
        ("parallel", "import deepspeed\nimport torch.distributed\nfrom moesaic.moe.model import Transformer"),
        ("launch", "import hydra, wandb\nfrom moesaic.parallel import mesh"),
    ],
)
def test_an_allowed_import_passes(folder, code):
    assert [broken_rules(folder, name) for name in imports(code) if broken_rules(folder, name)] == []


def test_no_program_hides_a_module():
    """torchrun and python put launch/ first on sys.path: a file there named `queue.py` would be everybody's `queue`."""
    taken = set(sys.stdlib_module_names) | OPTIONAL_MODULES | set(importlib.metadata.packages_distributions())
    names = {path.stem if path.is_file() else path.name for path in (ROOT / "launch").iterdir()} - {
        "__init__",
        "__pycache__",
    }
    assert names & taken == set()


def test_budgets():
    """Deleting a layer of indirection or a knob nobody needs is the way to keep them; see docs/log.md before raising one."""
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in sources(*PACKAGES)}
    assert {path: count for path, count in lines.items() if count > FILE_BUDGET} == {}
    assert sum(lines.values()) <= TOTAL_BUDGET
    assert (
        f"{FILE_BUDGET} lines a file and {TOTAL_BUDGET:,} in the five packages"
        in (ROOT / "CONTRIBUTING.md").read_text()
    )


def test_namespace():
    """moesaic/ holds relative symlinks to the packages; kernels/ must not be a regular package of its own."""
    links = {path.name: path.readlink().as_posix() for path in (ROOT / "moesaic").iterdir() if path.is_symlink()}
    assert links == {name: f"../{name}" for name in PACKAGES}
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert all((ROOT / name / "__init__.py").is_file() for name in PACKAGES if name != "kernels")


def test_recipes_hold_no_code():
    assert [path.name for path in sources("recipes")] == ["__init__.py"]
    assert ast.parse((ROOT / "recipes/__init__.py").read_text()).body[1:] == []


def test_fresh_memory_is_poisoned():
    """What conftest.py promises: NaN where the framework allocates, nothing elsewhere, and meta tensors stay without memory."""
    ours = {"__name__": "moesaic.moe.nobody", "torch": torch}
    exec("floats = torch.empty(2)\nintegers = torch.empty(2).new_empty(2, dtype=torch.int64)", ours)
    assert ours["floats"].isnan().all()
    assert ours["integers"].tolist() == [2**63 - 1] * 2
    with torch.device("meta"):
        exec("meta = torch.empty(2)", ours)
    assert ours["meta"].is_meta
    assert torch.empty(1000).isnan().sum() < 1000


def test_links_between_pages_lead_somewhere():
    pages = [path for path in ROOT.rglob("*.md") if not {".venv", "runs", "node_modules"} & set(path.parts)]
    assert len(pages) > 6
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"
