"""The files that are fetched, never committed: where each lies here, where it comes from, how it is told to be whole.

Sizes and digests are those that public documentation states. Where it states none, the SHA-256 of the first fetch is
written beside the file and holds from then on (`models.digests`); on the way in, a large file is also held against the
SHA-256 that the hub itself names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.checkpoints import looks_like
from models.digests import digest_of, recorded_digest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on a Hugging Face hub, of a model or of a dataset."""

    repository: str
    file: str
    revision: str = "main"
    repo_type: Literal["model", "dataset"] = "model"

    def __str__(self) -> str:
        """For people."""
        return f"{self.repository}, {self.file}"


@dataclass(frozen=True)
class AssetFile:
    """One file.

    path: below the repository's root. source: on the hub, or a plain URL. size: in bytes. digest: the algorithm, a
    colon and the hexadecimal digest. The latter two are None where nothing public states them.
    """

    path: str
    source: HubFile | str
    size: int | None = None
    digest: str | None = None

    @property
    def name(self) -> str:
        """The file's name without folders."""
        return Path(self.path).name


@dataclass(frozen=True)
class Bundle:
    """What one name fetches.

    about: for people. licence: of the files. files: what is fetched. substitute: a file that serves as well as the
    first, where it is already there.
    """

    about: str
    licence: str
    files: tuple[AssetFile, ...]
    substitute: AssetFile | None = None

    def needed(self) -> tuple[AssetFile, ...]:
        """The files that are wanted here: the substitute in the place of the first, if that alone is there."""
        first, *others = self.files
        if self.substitute is None or (ROOT / first.path).exists() or not (ROOT / self.substitute.path).exists():
            return self.files
        return (self.substitute, *others)


SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"

PIPELINES = {
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "flux": "black-forest-labs/FLUX.1-dev",
}
"""Whole pipelines of a hub, by the name that each model has here; of the last two the terms must be accepted first."""


def _of_hub(
    folder: str, repository: str, *files: tuple[str, int, str] | str, revision: str = "main"
) -> tuple[AssetFile, ...]:
    """Files of a repository, below `folder` as they lie there; with size and SHA-256, where these are published."""
    told = [(file, None, None) if isinstance(file, str) else file for file in files]
    return tuple(
        AssetFile(f"{folder}/{name}", HubFile(repository, name, revision), size, sha256 and f"sha256:{sha256}")
        for name, size, sha256 in told
    )


_HPS_REVISION = "697403c78157020a1ae59d23f111aa58ced35b0a"

SD15_SAFETENSORS, SD15_CKPT = _of_hub(
    "src/ms_coco",
    SD15,
    (
        "v1-5-pruned-emaonly.safetensors",
        4_265_146_304,
        "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
    ),
    ("v1-5-pruned-emaonly.ckpt", 4_265_380_512, "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516"),
)
TOKENIZER = _of_hub(
    "src/pipelines/sd15",
    SD15,
    ("tokenizer/vocab.json", 1_059_962, "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349"),
    ("tokenizer/merges.txt", 524_619, "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"),
)
HPS = {
    "v2.1": AssetFile(
        "weights/HPS_v2.1_compressed.pt",
        HubFile("xswu/HPSv2", "HPS_v2.1_compressed.pt", _HPS_REVISION),
        1_972_490_005,
        "sha256:c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
    ),
    "v2.0": AssetFile(
        "weights/HPS_v2_compressed.pt",
        HubFile("xswu/HPSv2", "HPS_v2_compressed.pt", _HPS_REVISION),
        digest="md5:fd9180de357abf01fdb4eaad64631db4",
    ),
}
COCO_PROMPTS = AssetFile(
    "src/prompts/MS-COCO_val2014_30k_captions.csv",
    "https://github.com/boomb0om/text2image-benchmark/releases/download/v0.0.1/MS-COCO_val2014_30k_captions.csv",
)
HPD_PROMPTS = tuple(
    AssetFile(
        f"src/prompts/hpdv2/{style}.json",
        HubFile("zhwang/HPDv2", f"benchmark/{style}.json", "260dbde75ab1c68e86d32a8e7739f1b49b100578", "dataset"),
    )
    for style in ("anime", "concept-art", "paintings", "photo")
)
PICKSCORE = _of_hub(
    "weights/pickscore",
    "yuvalkirstain/PickScore_v1",
    "config.json",
    "model.safetensors",
    revision="a4e4367c6dfa7288a00c550414478f865b875800",
)
CLIP = _of_hub(
    "weights/clip-vit-large-patch14",
    "openai/clip-vit-large-patch14",
    ("config.json", 4_519, "8a09b467700c58138c29d53c605b34ebc69beaadd13274a8a2af8ad2c2f4032a"),
    ("model.safetensors", 1_710_540_580, "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"),
    revision="32bd64288804d66eefd0ccbe215aa642df71cc41",
)
CLIP_336 = _of_hub(
    "weights/clip-vit-large-patch14-336",
    "openai/clip-vit-large-patch14-336",
    ("config.json", 4_757, "51b1c14aabcdf639c4a0370eeda1010b773bbe1df78319c7d0f5882c22ac0ac0"),
    ("pytorch_model.bin", 1_711_974_081, "c6032c2e0caae3dc2d4fba35535fa6307dbb49df59c7e182b1bc4b3329b81801"),
    revision="ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
)
IMAGEREWARD = _of_hub(
    "weights/imagereward",
    "zai-org/ImageReward",
    "ImageReward.pt",
    "med_config.json",
    revision="5736be03b2652728fb87788c9797b0570450ab72",
)
BERT_TOKENIZER = _of_hub(
    "weights/bert-base-uncased",
    "google-bert/bert-base-uncased",
    "tokenizer.json",
    "tokenizer_config.json",
    revision="86b5e0934494bd15c9632b12f734a8a67f723594",
)
AESTHETIC = AssetFile(
    "weights/aesthetic/sac+logos+ava1-l14-linearMSE.pth",
    HubFile("camenduru/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth"),
    3_714_759,
    "sha256:21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
)
_EPD = "https://raw.githubusercontent.com/BeierZhu/EPD/88a91f0914069afd700bfee1b590c7b61ceae240"
EPD_TABLES = tuple(
    AssetFile(f"exps/{path}", f"{_EPD}/exps/{path}", size, f"sha256:{digest}")
    for path, size, digest in (
        ("sd15/sd15-start.pkl", 7028, "d4100761bd11deb2f4d831dc147d088a39c52a6df13675b979deaa9a3b0aead3"),
        ("sd15/sd15-distilled.pkl", 7177, "f0852617b62481a94de4b85d3db4a1ae3cb9d74c4f2ae86260296b0902415f9d"),
        ("sd15/sd15-best.pkl", 7177, "2e14a48e6b28944091b49d7cb3f0aa009bafad8668888fa584b09da5205ba227"),
        ("sd3-512/sd3-512-start.pkl", 7166, "9f53994ff9428690792650c64c96009d4c1c668652d16dd6fa26658f4d78caab"),
        ("sd3-512/sd3-512-distilled.pkl", 7319, "c315cb5a1f8548228d08a8e8be4f2c4da6e9b95fd71bc50e5bfbcec1f9033527"),
        ("sd3-512/sd3-512-best.pkl", 7319, "fd088ef6d9b6c4156c5abe20b303bb626329edcbf00e655c749c2a33a28f0344"),
        ("sd3-1024/sd3-1024-start.pkl", 7166, "81d0c0df1d7a5d58d8535337ca50ed90623c5216dbed53cd4dd6995711d0d867"),
        ("sd3-1024/sd3-1024-distilled.pkl", 7319, "d4d0657122cbac4e31a2d4c1170dc6b078e79caeab622463a2e6e76781b99173"),
        ("sd3-1024/sd3-1024-best.pkl", 7319, "ef67ea4f157a3dc119276e9427e5a32389a18072e32afce846f700b75639edd3"),
        ("flux/flux-start.pkl", 7255, "f9fc1e997d8e8e0bc673add9511daca5a8cb28a644e5f9f7fd4c1bb0c7ad8a2a"),
        ("flux/flux-best.pkl", 7622, "f96cc971995114a31bfb0e9edf16d48ffdd5191e40a247714ca6834843815198"),
    )
)
# The digest is the one that k-diffusion's `evaluation.py` pins, and others that fetched the same address.
INCEPTION = AssetFile(
    "weights/inception-2015-12-05.pt",
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    95_607_719,
    "sha256:f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
)
# Published on a drive for people, which hands large files out under this address.
MPS = AssetFile(
    "weights/mps/MPS_overall_checkpoint.pth",
    "https://drive.usercontent.google.com/download?id=17qrK_aJkVNM75ZEvMEePpLj6L867MLkN&export=download&confirm=t",
)

BUNDLES = {
    "tokenizer": Bundle("CLIP's tokenizer (1.6 MB), which rewards and single files need", "MIT", TOKENIZER),
    "sd15": Bundle(
        "Stable Diffusion v1.5 in a single file, and its tokenizer",
        "CreativeML Open RAIL-M; the tokenizer MIT",
        (SD15_SAFETENSORS, *TOKENIZER),
        SD15_CKPT,
    ),
    "hpsv2": Bundle(
        "HPS v2.1, the training reward, and CLIP's tokenizer",
        "Apache 2.0; the tokenizer MIT",
        (HPS["v2.1"], *TOKENIZER),
    ),
    "hpsv2.0": Bundle("HPS v2.0 and CLIP's tokenizer", "Apache 2.0; the tokenizer MIT", (HPS["v2.0"], *TOKENIZER)),
    "coco-prompts": Bundle("30,000 captions of MS-COCO val2014", "CC BY 4.0 (COCO's annotations)", (COCO_PROMPTS,)),
    "hpsv2-prompts": Bundle("the four styles of HPSv2's benchmark, 800 prompts each", "Apache 2.0", HPD_PROMPTS),
    "pickscore": Bundle(
        "PickScore v1, a preference score, and CLIP's tokenizer",
        "its model card states none; the tokenizer MIT",
        (*PICKSCORE, *TOKENIZER),
    ),
    "clip": Bundle("CLIP ViT-L/14, for the CLIP score", "MIT", (*CLIP, *TOKENIZER)),
    "clip336": Bundle("CLIP ViT-L/14 at 336 pixels, for the distance CMMD", "MIT", CLIP_336),
    "inception": Bundle(
        "InceptionV3 in TorchScript, for the distances FID and KID",
        "Apache 2.0 (the TensorFlow network that it is a translation of)",
        (INCEPTION,),
    ),
    "aesthetic": Bundle(
        "LAION aesthetic predictor v2, and the CLIP ViT-L/14 it stands on",
        "Apache 2.0; CLIP and tokenizer MIT",
        (AESTHETIC, *CLIP, *TOKENIZER),
    ),
    "imagereward": Bundle(
        "ImageReward v1.0, a preference score, and BERT's tokenizer", "Apache 2.0", (*IMAGEREWARD, *BERT_TOKENIZER)
    ),
    "mps": Bundle(
        "MPS, overall preference (github.com/Kwai-Kolors/MPS), and CLIP's tokenizer",
        "it states none; the tokenizer MIT",
        (MPS, *TOKENIZER),
    ),
    "epd-tables": Bundle("the published EPD tables, from github.com/BeierZhu/EPD", "it states none", EPD_TABLES),
}

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def pinned_digest(asset: AssetFile, path: Path) -> str | None:
    """What the file's digest must be: as published, else as recorded by the first fetch, else None."""
    if asset.digest is not None:
        return asset.digest
    recorded = recorded_digest(path)
    return None if recorded is None else f"sha256:{recorded}"


def fault_of(asset: AssetFile, path: Path, pinned: str | None) -> str | None:
    """What is wrong with the file at `path` as this asset, held against the digest `pinned`; None where it is right."""
    size = path.stat().st_size
    if asset.size not in (None, size):
        return f"it has {size} bytes instead of {asset.size}: {_identified(path)}"
    if pinned is None:
        return None
    algorithm, _, expected = pinned.partition(":")
    found = digest_of(path, algorithm)
    if found == expected:
        return None
    return f"its {algorithm.upper()} is {found} instead of {expected}: {_identified(path)}"


def _identified(path: Path) -> str:
    """What a file in the place of another is: one of the table's, or what it looks like."""
    other = published_name(path)
    return f"it is {other}" if other else looks_like(path)


def published_name(path: Path) -> str | None:
    """The name under which exactly this file is published, if it is any of the table's; reads the whole file."""
    size = path.stat().st_size
    for bundle in BUNDLES.values():
        for asset in (*bundle.files, *([bundle.substitute] if bundle.substitute else [])):
            algorithm, _, expected = (asset.digest or "").partition(":")
            if expected and asset.size in (None, size) and digest_of(path, algorithm) == expected:
                return asset.name
    return None
