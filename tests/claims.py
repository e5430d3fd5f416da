"""The mark of a test that is a claim of a paper: `pytest --claims` prints all of them."""
import pytest

PAPERS = {
    "porzi2019": "Seamless Scene Segmentation",
    "porzi2021": "Improving Panoptic Segmentation at All Scales",
    "sofiiuk2019": "AdaptIS: Adaptive Instance Selection Network",
    "li2020": "Unifying Training and Inference for Panoptic Segmentation",
    "degeus2023": "Intra-Batch Supervision for Panoptic Segmentation on High-Resolution Images",
    "kirillov2019": "Panoptic Segmentation"}


def claim(paper, where, text, of="", figure="", result=""):
    """A mark. `paper`: a key of PAPERS; `where`: its section or equation; `text`: the claim; `of`:
    the function it is about; `figure`: a file in figures/; `result`: a row of RESULTS.md."""
    if paper not in PAPERS:
        raise ValueError(f"no paper {paper!r}: take one of {', '.join(PAPERS)}")
    return pytest.mark.claim(paper=paper, where=where, text=text, of=of, figure=figure,
                             result=result)
