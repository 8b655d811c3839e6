"""Build of the compiled objects; everything else is in pyproject.toml.

torch importable: the objects are built now, against it. Not importable (pip's isolated build), or older than the package asks for
(pip is about to replace it): a plain Python install, and one build at first use. ``SAGE_FAST_BUILD``: auto (default; a failed build
leaves a working package without kernels), aot (a failed build is an error), jit and none (nothing is built here).
"""

import json
import os
import runpy
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent.resolve()
MODE = os.environ.get("SAGE_FAST_BUILD", "auto")
build = runpy.run_path(str(ROOT / "sage_fast" / "_build.py"))
if MODE not in build["MODES"]:
    sys.exit(f"SAGE_FAST_BUILD must be one of {', '.join(build['MODES'])}, got '{MODE}'.")


def extensions():
    """The extensions and the build command, or none of them with the reason on stderr."""
    if MODE in ("jit", "none"):
        return {}
    try:
        found, command = build["extensions"](ROOT), build["build_command"]()
    except (ImportError, build["BuildError"]) as error:
        if MODE == "aot":
            raise
        print(f"sage_fast: nothing is compiled now ({error}); the kernels are built at first use.", file=sys.stderr)
        return {}

    class Build(command):
        """Leaves ``_build_info.json`` beside the objects, with the reason when the compiler fails."""

        def run(self):
            reason, inplace = None, self.inplace  # setuptools forgets inplace when the build fails
            try:
                super().run()
            except Exception as error:
                if MODE == "aot":
                    raise
                reason = build["no_compiler"]() or build["complaint"](str(error))
                print(f"sage_fast: no kernels, the PyTorch reference will run: {reason}", file=sys.stderr)
                self.extensions = []
            folder = ROOT / "sage_fast" if inplace else Path(self.build_lib) / "sage_fast"
            folder.mkdir(parents=True, exist_ok=True)
            stale = ["_ops_*.so", "_host*.so"] if reason is not None else ["_ops_cuda*.so"] if self.no_cuda else []
            for path in (path for pattern in stale for path in folder.glob(pattern)):
                path.unlink()  # of an earlier build, and not of these sources
            (folder / build["INFO"]).write_text(json.dumps(build["describe"](reason, self.no_cuda), indent=2))

        def copy_extensions_to_source(self):
            if self.extensions:
                super().copy_extensions_to_source()

    return {"ext_modules": found, "cmdclass": {"build_ext": Build}}


setup(
    packages=[
        *find_packages(include=["sage_fast", "sage_fast.*"]),
        "sage_fast.csrc",
        "sage_fast.csrc.cpu",
        "sage_fast.csrc.cuda",
    ],
    package_dir={"sage_fast": "sage_fast", "sage_fast.csrc": "csrc"},
    package_data={
        "sage_fast": ["py.typed", "model/*"],
        "sage_fast.csrc": ["*.cpp", "*.h", "cpu/*", "cuda/*"],
    },
    **extensions(),
)
