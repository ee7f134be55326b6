"""What mkdocs.yml adds to the pages of this folder: a reference made of docstrings, the knobs, and files that pages link to.

Nothing is imported but the dataclasses of the knobs. Modules are read as text, so that folders behind the symlinks of moesaic/
need no special care (kernels/ has no __init__.py), and no kernel starts an interpreter. A page links to files as they lie in the
repository; on the site such a link leads to the module's reference, to the other page, or to a page that shows the file.
"""

import ast
import dataclasses
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {
    "kernels": "Device kernels, what they are held to, and operations in plain torch",
    "moe": "The model, on one device",
    "parallel": "How the model is spread, saved and traced",
    "launch": "The programs a person runs",
}
PROJECT = [Path(name) for name in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
SCHEMA = Path("launch/schema.py")  # on the site, the tables made of it
# Of the pages that show a file, which: by their place on the site.
shown_from: dict[str, Path] = {}
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    made: dict[str, str | bytes] = {"reference/index.md": index(), "reference/knobs.md": knobs()}
    made |= {module_uri(path): module_page(path) for layer in LAYERS for path in modules(layer)}
    made |= {site_uri(path): shown(path) for path in PROJECT}
    shown_from.update((site_uri(path), path) for path in PROJECT)
    waiting = [*PROJECT, *(path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md"))]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        for target in targets(page):
            if target in seen or target.parts[0] == "docs" or site_uri(target).startswith("reference/"):
                continue
            seen.add(target)
            made[site_uri(target)] = shown(target)
            shown_from[site_uri(target)] = target
            if target.suffix == ".md":
                waiting.append(target)
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links of the site."""
    here = page.file.src_uri
    if here.startswith("reference/"):
        return markdown
    source = ROOT / shown_from.get(here, Path("docs") / here)

    def site_link(found: re.Match[str]) -> str:
        target = repository_path(source, found[2])
        if target is None or not (ROOT / target).exists():
            return found[0]
        return f"{found[1]}{os.path.relpath(site_uri(target), Path(here).parent)}{found[3] or ''})"

    return LINK.sub(site_link, markdown)


# ---------------------------------------------------------------- files of the repository


def repository_path(page: Path, link: str) -> Path | None:
    """The path of what `page` links to, below the repository's root; None for an address elsewhere."""
    if "://" in link or link.startswith("mailto:"):
        return None
    return Path(os.path.normpath(page.parent / link)).relative_to(ROOT)


def targets(page: Path) -> Iterator[Path]:
    for found in LINK.finditer((ROOT / page).read_text()):
        target = repository_path(ROOT / page, found[2])
        if target and (ROOT / target).is_file():
            yield target


def site_uri(path: Path) -> str:
    """Where a file of the repository is on the site."""
    if path.parts[0] == "docs":
        return path.relative_to("docs").as_posix()
    if path == SCHEMA:
        return "reference/knobs.md"
    if path.suffix == ".py" and path.parts[0] in LAYERS and len(path.parts) == 2:
        return module_uri(ROOT / path)
    if path.name == "README.md":  # which mkdocs would take for a folder's index
        path = Path(path.parent.as_posix().strip(".") or "readme").with_suffix(".md")
    return f"project/{path.as_posix()}" if path.suffix in (".md", ".png") else f"project/{path.as_posix()}.md"


def shown(path: Path) -> str | bytes:
    if path.suffix == ".png":
        return (ROOT / path).read_bytes()
    text = (ROOT / path).read_text()
    if path.suffix == ".md":
        return text
    language = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".toml": "toml"}.get(path.suffix, "text")
    return f"# {path.as_posix()}\n\n~~~~{language}\n{text.rstrip()}\n~~~~\n"


# ---------------------------------------------------------------- the reference


def modules(layer: str) -> list[Path]:
    return [path for path in sorted((ROOT / layer).glob("*.py")) if path.stem != "__init__"]


def module_uri(path: Path) -> str:
    return f"reference/{path.parent.name}/{path.stem}.md"


def index() -> str:
    lines = [
        "# Reference",
        "",
        "Made of the docstrings. A name is imported as `moesaic.FOLDER.MODULE`. What the knobs of a run mean: [knobs](knobs.md).",
    ]
    for layer, what in LAYERS.items():
        lines += ["", f"## {layer}/", "", f"{what}.", "", "| module | |", "|---|---|"]
        for path in modules(layer):
            first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")
            lines.append(f"| [{path.stem}]({layer}/{path.stem}.md) | {escaped(first).replace('|', '&#124;')} |")
    return "\n".join(lines) + "\n"


def module_page(path: Path) -> str:
    """Markdown: the module's docstring, then its public classes with their methods, and functions, in the file's order."""
    tree = ast.parse(path.read_text())
    lines = [f"# moesaic.{path.parent.name}.{path.stem}", "", prose(ast.get_docstring(tree) or "")]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            lines += ["", f"## {node.name} {{ #{node.name} }}", "", fenced(class_signature(node)), ""]
            lines += [prose(ast.get_docstring(node) or "")]
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                    name = f"{node.name}.{member.name}"
                    lines += ["", f"### {name} {{ #{name} }}", "", fenced(signature(member)), ""]
                    lines += [prose(ast.get_docstring(member) or "")]
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            lines += ["", f"## {node.name} {{ #{node.name} }}", "", fenced(signature(node)), ""]
            lines += [prose(ast.get_docstring(node) or "")]
    return "\n".join(lines) + "\n"


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def signature(node: ast.FunctionDef, more: str = "") -> str:
    """The line of `def`, with decorators, without a body; one argument a line where it is long."""
    decorators = [f"@{ast.unparse(one)}\n" for one in node.decorator_list]
    end = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    short = f"def {node.name}({ast.unparse(node.args)}){end}"
    if len(short) <= 100:
        return "".join(decorators) + short
    args, parts = node.args, list[str]()
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    for arg, default in zip(plain, defaults, strict=True):
        parts.append(ast.unparse(arg) + given(arg, default))
    if args.vararg or args.kwonlyargs:
        parts.append(f"*{ast.unparse(args.vararg) if args.vararg else ''}")
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        parts.append(ast.unparse(arg) + given(arg, default))
    if args.kwarg:
        parts.append(f"**{ast.unparse(args.kwarg)}")
    body = "".join(f"    {part},\n" for part in parts)
    return "".join(decorators) + f"def {node.name}(\n{body}){end}"


def given(arg: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return ""
    return f" = {ast.unparse(default)}" if arg.annotation else f"={ast.unparse(default)}"


def class_signature(node: ast.ClassDef) -> str:
    """The line of `class`, and its annotated fields; of a class without fields, the arguments it is made with."""
    decorators = [f"@{ast.unparse(one)}\n" for one in node.decorator_list]
    bases = ", ".join(ast.unparse(one) for one in [*node.bases, *node.keywords])
    fields = [
        ast.unparse(one)
        for one in node.body
        if isinstance(one, ast.AnnAssign) and not ast.unparse(one.target).startswith("_")
    ]
    if not fields:
        made = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
        fields = [line for one in made for line in signature(one).splitlines()]
    body = "".join(f"\n    {line}" for line in fields)
    return "".join(decorators) + f"class {node.name}{f'({bases})' if bases else ''}" + (f":{body}" if body else "")


# ---------------------------------------------------------------- docstrings are plain text, aligned by hand


def prose(text: str) -> str:
    """Markdown of a docstring: columns become a table, what else is aligned stays as it is typed, the rest flows."""
    return "\n\n".join(paragraph(part) for part in re.split(r"\n\s*\n", text) if part.strip())


def paragraph(text: str) -> str:
    text = text.strip("\n")
    if re.match(r"(\d+\.|-) ", text):
        return linked(escaped(text))
    head, _, rest = text.partition("\n")
    rows = columns(text)
    if rows:
        return table(rows)
    if head.rstrip().endswith(":") and (rows := columns(rest)):
        return f"{linked(escaped(head))}\n\n{table(rows)}"
    if any(line.startswith(" ") or re.search(r"\S {2,}\S", line) for line in text.split("\n")):
        return f"```text\n{text}\n```"
    return linked(escaped(text))


def columns(text: str) -> list[tuple[str, str]] | None:
    """(name, meaning) of lines such as `steps    optimizer steps in all`, with what is indented below; None for other text."""
    rows: list[tuple[str, str]] = []
    for line in text.split("\n"):
        found = re.match(r"(\S+(?: \S+)*?)(?:  +|, or )(\S.*)$", line) or re.match(
            r"(\w+) (\S.*)$", line if rows else ""
        )
        if found and "  " not in found[2].strip():
            rows.append((found[1], found[2]))
        elif rows and re.match(r" {4,}\S", line):
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {line.strip()}")
        else:
            return None
    return rows


def table(rows: list[tuple[str, str]]) -> str:
    lines = [f"| `{name}` | {linked(escaped(meaning)).replace('|', '&#124;')} |" for name, meaning in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def escaped(text: str) -> str:
    """Text as Markdown that shows it, but for what stands in backticks or is bold."""
    parts = re.split(r"(`[^`]*`|\*\*[^*]+\*\*)", text)
    return "".join(part if i % 2 else re.sub(r"([\\*_\[\]<>#])", r"\\\1", part) for i, part in enumerate(parts))


def linked(text: str) -> str:
    """Names of modules lead to their pages."""

    def link(found: re.Match[str]) -> str:
        name = found[0].replace("\\", "")
        _, layer, module, *inside = name.split(".")
        path = ROOT / layer / f"{module}.py"
        if not path.exists():
            return found[0]
        anchor = (
            f"#{inside[0]}" if inside and re.search(rf"^(?:def|class) {inside[0]}\b", path.read_text(), re.M) else ""
        )
        return f"[{found[0]}](../{layer}/{module}.md{anchor})"

    return re.sub(rf"moesaic\.(?:{'|'.join(LAYERS)})\.[a-z](?:\\?\w)*(?:\.[A-Za-z](?:\\?\w)*)?", link, text)


# ---------------------------------------------------------------- knobs


def knobs() -> str:
    """A table for every group of knobs of launch/train.py: name, type, default, meaning."""
    from moesaic.launch.schema import Config

    lines = [
        "# Knobs",
        "",
        "Of a run, each written `knob=value` behind `launch/train.py`. A recipe sets some of them.",
        "",
    ]
    return "\n".join([*lines, *group(Config, "")]) + "\n"


def group(kind: Any, prefix: str) -> Iterator[str]:
    """Tables of a dataclass's own fields, then of those that are dataclasses themselves, each explained in its docstring."""
    first, *parts = inspect.cleandoc(kind.__doc__).split("\n\n")
    meanings: dict[str, str] = {}
    for names, meaning in [row for part in parts for row in columns(part) or []]:
        meanings |= dict.fromkeys(names.split(", "), meaning)
    if first.endswith("as of fprop."):
        meanings = {name: f"see precision.fprop.{name}" for name in ("rotation", "signs")}
    hints, below = get_type_hints(kind), []
    yield from [f"## {prefix.rstrip('.') or 'the run'}", "", escaped(first.replace("\n", " ")), ""]
    rows = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            below.append((hints[field.name], f"{prefix}{field.name}."))
            continue
        meaning = linked(escaped(meanings.get(field.name, ""))).replace("|", "&#124;").replace("](../", "](")
        rows.append(f"| `{prefix}{field.name}` | `{as_yaml(field)}` | {meaning} |")
    yield from ["| knob | default | |", "|---|---|---|", *rows, ""] if rows else []
    for inner, name in below:
        yield from group(inner, name)


def as_yaml(field: Any) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
