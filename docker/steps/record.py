"""Last step of an image build: write down what the image is made of.

BUILD_INFO.json     versions, and the arguments of the build
sbom.cdx.json       every Python and system package, as CycloneDX 1.6
commands            sft-job's commands, one a line, for the entry point
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import uuid
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote

SHARE = Path(__file__).parent
ARGUMENTS = (
    "REVISION",
    "CREATED",
    "SOURCE",
    "FINAL_BASE",
    "FINAL_DIGEST",
    "BUILD_BASE",
    "BUILD_DIGEST",
)


def main() -> None:
    from sft_job import __version__
    from sft_job.cli import COMMANDS

    flavor, version = os.environ["FLAVOR"], os.environ["VERSION"]
    if version != __version__:
        sys.exit(
            f"error: VERSION={version}, but the package is {__version__}\n"
            "  -> leave --build-arg VERSION out, or build that version's checkout"
        )
    packages = {name(d): d for d in distributions()}
    lock = SHARE / "locks" / f"{flavor}.txt"
    info = {
        "version": version,
        "flavor": flavor,
        "lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest(),
        "python": platform.python_version(),
        "system": os_release()["PRETTY_NAME"],
        "packages": {
            package: packages[package].version
            for package in ("torch", "transformers", "accelerate", "deepspeed", "flash-attn",
                            "flash-attn-3", "xformers", "liger-kernel", "triton")
            if package in packages
        },
        **{argument.lower(): os.environ.get(argument, "") for argument in ARGUMENTS},
    }  # fmt: skip
    write("BUILD_INFO.json", info)
    write("sbom.cdx.json", sbom(packages, flavor, version))
    (SHARE / "commands").write_text("".join(f"{command}\n" for command in COMMANDS))


def name(distribution: Distribution) -> str:
    """Normalised, as in a lock."""
    return re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()


def sbom(packages: dict[str, Distribution], flavor: str, version: str) -> dict[str, Any]:
    root = {
        "type": "container", "bom-ref": "image", "name": f"sft_job-{flavor}", "version": version,
    }  # fmt: skip
    components = [python_component(key, packages[key]) for key in sorted(packages)]
    components += system_components()
    # The same image gets the same number.
    text = json.dumps([root, components], sort_keys=True)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, text)}",
        "version": 1,
        "metadata": {"component": root},
        "components": components,
    }


def python_component(key: str, distribution: Distribution) -> dict[str, Any]:
    purl = f"pkg:pypi/{key}@{quote(distribution.version)}"
    component: dict[str, Any] = {
        "type": "library", "bom-ref": purl, "name": key, "version": distribution.version,
        "purl": purl,
    }  # fmt: skip
    expression, text = (distribution.metadata.get(k) for k in ("License-Expression", "License"))
    if expression:
        component["licenses"] = [{"expression": expression}]
    elif text and "\n" not in text:  # else it is the whole text
        component["licenses"] = [{"license": {"name": text}}]
    return component


def system_components() -> list[dict[str, Any]]:
    system = os_release()
    form = "${Package}\t${Version}\t${Architecture}\n"
    query = ["dpkg-query", "--show", f"--showformat={form}"]
    found = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    components = []
    for line in found.splitlines():
        package, version, architecture = line.split("\t")
        purl = (
            f"pkg:deb/{system['ID']}/{quote(package)}@{quote(version)}"
            f"?arch={architecture}&distro={system['ID']}-{system['VERSION_ID']}"
        )
        components.append(
            {"type": "library", "bom-ref": purl, "name": package, "version": version, "purl": purl}
        )
    return components


def os_release() -> dict[str, str]:
    return platform.freedesktop_os_release()


def write(file: str, value: dict[str, Any]) -> None:
    (SHARE / file).write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
