"""Wheels for a machine without network that has torch, but not what acl_nb needs beside it: `python .ci/wheels.py [3.12]` fills .wheels/.

The names come from settings.ini: its requirements, less what such a machine has, and what the benches compare with.
"""
import re
import shlex
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
THERE = {"torch", "torchvision", "accelerate", "safetensors", "scikit-learn", "numpy", "scipy", "pillow",
         "psutil", "filelock", "jinja2"}                             # what comes with torch and accelerate on such a machine

def name_of(requirement):
    "The project that a requirement names."
    return re.match(r"[\w.-]+", requirement)[0].lower()

def wanted(settings):
    "(with what they need in turn, alone): requirements of package and tests, and of the benches, whose own need is torch."
    package = [r for r in shlex.split(settings["requirements"]) if name_of(r) not in THERE]
    tests = [r for r in shlex.split(settings["dev_requirements"]) if name_of(r) == "hypothesis"]
    return package + tests, shlex.split(settings["bench_requirements"])

def download(requirements, python, *more):
    "Into .wheels/, for manylinux on x86-64."
    target = ["--python-version", python, "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "-d", str(ROOT/".wheels"), *target, *more]
    if subprocess.run([*command, *requirements]).returncode: sys.exit(2)       # pip has said why

def main():
    python = (sys.argv[1:] or ["3.12"])[0]
    if not re.fullmatch(r"3\.\d+", python):
        print(f"error: the version of Python must be like 3.12; got {python}", file=sys.stderr)
        sys.exit(2)
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT/"settings.ini", encoding="utf-8")
    package, benches = wanted(ini["DEFAULT"])
    download(package, python)
    download(benches, python, "--no-deps")
    files = sorted((ROOT/".wheels").glob("*.whl"))
    print(f".wheels holds {len(files)} wheels for Python {python}, {sum(f.stat().st_size for f in files) / 2**20:.0f} MiB")

if __name__ == "__main__": main()
