"Everything a build needs is in settings.ini; this file only hands it to setuptools."
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here/"settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"],
    long_description=(here/"README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"], keywords=cfg["keywords"].split(),
    license="Apache-2.0", license_files=["LICENSE"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    package_data={cfg["lib_path"]: ["templates/*", "py.typed"], cfg["lib_path"] + ".plots": ["live.js"]},
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={extra: shlex.split(cfg[f"{extra}_requirements"]) for extra in ("dev", "tensorboard", "trackio", "wandb", "timm", "peft", "torchcodec", "hub", "onnx", "studies")},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False,
)
