"""What the site adds to nbdev's pages (`make docs` puts this folder on the path): how a symbol is shown (`renderer` in settings.ini), and how a tutorial is run elsewhere (`procs`)."""
import ast
import inspect
import re
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path

from execnb.nbio import mk_cell
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, patch_name
from nbdev.process import Processor
from nbdev.showdoc import BasicMarkdownRenderer

@cache
def definitions():
    "Name -> (link, source) of all that the modules define; nbdev's own index leaves out what `__init__.py` holds."
    cfg, found = get_config(), {}
    for file in sorted((root := Path(cfg.config_path)).glob(f"{cfg.lib_name}/**/*.py")):
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines()
        held = [(node, node.name if isinstance(node, ast.ClassDef) else patch_name(node)) for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        held += [(part, f"{name}.{part.name}") for node, name in held if isinstance(node, ast.ClassDef) for part in node.body if isinstance(part, ast.FunctionDef)]
        link = f"{cfg.git_url}/blob/{cfg.branch}/{file.relative_to(root).as_posix()}"
        for node, names in held: found |= {name: (f"{link}#L{node.lineno}", "\n".join(lines[node.lineno - 1:node.end_lineno])) for name in ([names] if isinstance(names, str) else names)}
    return found

def fields(source):
    "A class that is a list of fields, as it is written, without its methods."
    head, *body = source.splitlines()
    return "\n".join([head, *[line for line in body if re.match(r"    \w+ *:", line)]])

class Renderer(BasicMarkdownRenderer):
    "Markdown of one symbol."
    def __init__(self, sym, name=None, title_level=3):
        super().__init__(sym, name=name or getattr(sym, "__qualname__", None), title_level=title_level)      # of what is decorated, too
        self.attribute = isinstance(sym, property)
        self.link, self.source = definitions().get(self.nm, (None, None))
        for p in self.dm.dm.values():
            if p.get("anno") is type(None): p.pop("anno")        # guessed from the default

    def signature(self):
        "What stands in the grey box."
        sym = self.sym
        if self.attribute: return self.nm
        if not inspect.isclass(sym): return str(self.dm)
        if is_dataclass(sym) or hasattr(sym, "_fields"): return fields(self.source)
        return f"class {sym.__name__}({', '.join(b.__name__ for b in sym.__bases__)})" if [*self.dm.dm][:1] in ([], ["args"]) else str(self.dm)

    def _repr_markdown_(self):
        heading, said = "#" * self.title_level + " " + self.nm.replace("__", r"\_\_"), f"\n\n*{self.docs}*" if self.docs else ""
        link = NbdevLookup().code(self.fn) or self.link
        source = f'[source]({link}){{target="_blank" style="float:right; font-size:smaller"}}\n\n' if link else ""
        signature = self.signature()
        kept = '{.python code-overflow="scroll"}' if signature.startswith("class") else "python"        # fields stand in columns
        return f"---\n\n{source}{heading}\n\n```{kept}\n{signature}\n```{said}"

COLAB = "https://colab.research.google.com/github/"

class Badge(Processor):
    "On a tutorial's page, a link that opens its notebook in Colab; the notebook's first cell installs the package there."
    def end(self):
        cfg = get_config()
        path = Path(self.nb.path_).resolve().relative_to(cfg.config_path.resolve())
        if path.parent.name != "tutorials": return
        where = f"{COLAB}{cfg.git_url.removeprefix('https://github.com/')}/blob/{cfg.branch}/{path.as_posix()}"
        self.nb.cells.insert(1, mk_cell(f"[Open in Colab]({where}){{.btn .btn-outline-primary .btn-sm}}", "markdown"))
