"The scripts of the commands, written as pip writes them, whatever is installed here."
import re
from pathlib import Path

SETTINGS = (Path(__file__).parents[1]/"settings.ini").read_text(encoding="utf-8")
ENTRIES = dict(entry.split("=") for entry in re.search(r"^console_scripts = (.*)$", SETTINGS, re.M)[1].split())

def write_scripts(folder):
    "name -> path."
    made = {}
    for name, entry in ENTRIES.items():
        module, function = entry.split(":")
        made[name] = folder/name
        text = f"import sys\nfrom {module} import {function}\nif __name__ == '__main__':\n    sys.exit({function}())\n"
        made[name].write_text(text, encoding="utf-8")
    return made
