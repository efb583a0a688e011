"""What is read without a browser: each page of the site as Markdown (page.html.md), and their list, llms.txt (llmstxt.org)."""
import re

import nbformat
import yaml
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from traitlets.config import Config

ONLY_OUTPUT = {"enabled": True, "remove_input_tags": ["no-input"]}
EXPORTER = MarkdownExporter(config=Config(TagRemovePreprocessor=ONLY_OUTPUT))

FENCE = re.compile(r"^```.*?^```", re.M | re.S)

def markdown(nb):
    "A notebook that nbdev has prepared: its front matter, its Markdown below that as a head, the files of its images."
    nb.metadata["language_info"] = {"name": "python"}
    front, head = {}, ""
    if nb.cells[0].cell_type == "raw":              # where nbdev puts the title cell
        front = yaml.safe_load(nb.cells.pop(0).source.strip().strip("-"))
        head = f"# {front['title']}\n\n" + (f"> {front['description']}\n\n" if front.get("description") else "")
    for cell in nb.cells:
        if cell.cell_type == "code" and re.search(r"^#\| echo: false", cell.source, re.M):
            cell.metadata.tags = ["no-input"]
    body, extra = EXPORTER.from_notebook_node(nb)
    return front, head + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n", extra.get("outputs") or {}

def named(output):
    "An output that has no text, as a line that says what stands on the page."
    data = output.get("data", {})
    if not {"text/html", "image/svg+xml", "image/png"} & set(data): return
    title = data.get("application/vnd.plotly.v1+json", {}).get("layout", {}).get("title", {}).get("text", "")
    title = re.sub(r"<[^>]*>", " ", title).strip()
    output.data = {"text/markdown": f"*On the page a figure stands here{f': {title}' if title else ''}.*"}

def plain(text, home, up):
    "Markdown without what only the rendered page knows, and with its links to other Markdown of the site."
    text = re.sub(r"<!-- WARNING: .*? -->\s*", "", text)
    text = re.sub(r"(?<=\))\{(?:target|\.btn)[^}\n]*\}", "", text)
    text = re.sub(r"^```\{\.(\w+)[^}\n]*\}", r"```\1", text, flags=re.M)
    text = FENCE.sub(lambda fence: re.sub(r"\[`([^`\n]*)`\]\([^)\n]*\)", r"\1", fence[0]), text)   # nbdev's links in signatures
    text = text.replace(f"]({home}/", f"]({up}")
    return re.sub(r"(\]\((?!\w+:)[^)\s]*?)(?:\d+_)?([\w.]+)\.(?:ipynb|html)(?=[)#])", r"\1\2.html.md", text)

def pages(contents, folder):
    "The notebooks that a part of the sidebar names, in its order."
    for entry in [contents] if isinstance(contents, str) else contents:
        pattern = entry["auto"] if isinstance(entry, dict) else entry
        yield from sorted(folder.glob(pattern))

def main():
    "Write them, from what `nbdev_docs` has left in `_proc/`."
    cfg = get_config()
    proc, docs, home = cfg.config_path/"_proc", cfg.doc_path, cfg.doc_host + cfg.doc_baseurl
    lines = [f"# {cfg.title}", "", f"> {cfg.description}"]
    sidebar = yaml.safe_load((cfg.nbs_path/"sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    for part in sidebar:
        if isinstance(part, dict): lines += ["", f"## {part['section']}"]
        lines.append("")
        for notebook in pages(part["contents"] if isinstance(part, dict) else part, proc):
            nb = nbformat.read(notebook, 4)
            for cell in nb.cells:
                for output in cell.get("outputs", []): named(output)
            front, text, _ = markdown(nb)
            name = notebook.relative_to(proc).with_name(front["output-file"] + ".md")
            (docs/name).write_text(plain(text, home, "../" * (len(name.parts) - 1)), encoding="utf-8")
            lines.append(f"- [{front['title']}]({name.as_posix()}): {front['description']}")
    (docs/"llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

if __name__ == "__main__": main()
