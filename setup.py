"""Packaging of moe_dist; tools are configured in pyproject.toml, tested versions pinned in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="moe_dist",
    version="0.1.0",
    description="An expert-parallel training stack for mixture-of-experts models",
    license="Apache-2.0",
    packages=find_packages(include=["moe_dist", "moe_dist.*"]),
    python_requires=">=3.10",
    install_requires=["torch>=2.11", "numpy", "pydantic>=2.7", "pyyaml", "rich", "scipy", "typer"],
    extras_require={
        "deepspeed": ["deepspeed"],
        "megatron": ["megatron-core"],
        "gpu": ["nvidia-ml-py"],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "hf": ["transformers", "safetensors"],
        "dev": [
            "deepspeed",
            "hypothesis",
            "import-linter",
            "megatron-core",
            "mypy",
            "POT",
            "psutil",
            "pytest",
            "ruff",
            "transformers",
            'triton; platform_system == "Linux"',
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["moe-dist = moe_dist.cli.main:app"]},
)
