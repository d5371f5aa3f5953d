"""What names stand for."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import pytest

from cachefold.evaluation import naming as module
from cachefold.evaluation.naming import (
    Naming,
    codecs_of,
    is_artefact,
    of_one_ratio,
    parse_methods,
)

SHIPPED = Path(__file__).parents[2] / "artefacts"


def artefact(folder: Path, name: str, policy: str = "dmc", base: str = "b", **options) -> Path:
    """A config alone: names are read before any weight is."""
    place = folder / name
    place.mkdir(parents=True)
    config = {
        "format": 1, "base": {"id": base, "revision": "r"}, "lora_rank": 2,
        "policy": {"name": policy, **options},
    }  # fmt: skip
    (place / "cachefold.json").write_text(json.dumps(config))
    return place


def names(words: str, **options) -> list[str]:
    return [m.name for m in parse_methods(words.split(","), Naming(base="b", **options))]


def test_policies_come_at_every_ratio_and_codec_and_dense_first() -> None:
    assert names("tova,dense,h2o", crs=(2.0, 4.5)) == [
        "dense", "tova-cr2", "tova-cr4.5", "h2o-cr2", "h2o-cr4.5",
    ]  # fmt: skip
    assert names("full", codecs=(None, "int4")) == ["dense", "full", "full+int4"]
    assert names("tova+int4,h2o", codecs=("int8",)) == ["dense", "tova-cr2+int4", "h2o-cr2+int8"]
    assert names("full+int2,full+int8", codecs=("int4",)) == ["dense", "full+int2", "full+int8"]
    assert names("tova-cr8,tova", crs=(2.0,)) == ["dense", "tova-cr8", "tova-cr2"]
    assert names("tova,tova") == ["dense", "tova-cr2"]


def test_methods_say_what_they_are() -> None:
    _, tova, full = parse_methods(["tova", "full+int2"], Naming(base="b", crs=(4.0,)))
    assert (tova.policy, tova.cr, tova.codec, tova.artefact) == ("tova", 4.0, None, None)
    assert (full.policy, full.cr, full.codec) == ("full", None, "int2")
    assert tova.facts()["weights"] is None and json.dumps(tova.facts())


def test_a_dial_is_a_method_at_every_ratio(tmp_path: Path) -> None:
    shipped = tmp_path / "artefacts"
    dial = artefact(shipped, "b-dial", "dmc", cr=4, max_cr=8)
    two = artefact(shipped, "b-cr2", "dmc", cr=2)
    folders = {"folders": (shipped,), "crs": (2.0, 5.5)}
    found = parse_methods(["dmc", f"{dial}+int4"], Naming(base="b", **folders))[1:]
    # By name the artefact made for a ratio comes first, and a dial serves the others.
    assert [(m.name, m.artefact, m.dial, m.cr) for m in found] == [
        ("dmc-cr2", two, False, 2.0), ("dmc-cr5.5", dial, True, 5.5),
        ("b-dial-cr2+int4", dial, True, 2.0), ("b-dial-cr5.5+int4", dial, True, 5.5),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="serves cr from 1 to 8; got 9"):
        names(str(dial), crs=(2.0, 9.0))
    with pytest.raises(ValueError, match=r"no artefact of it at cr 9 .*\(there: cr 2, 8\)"):
        names("dmc", folders=(shipped,), crs=(9.0,))


def test_artefacts_by_name(tmp_path: Path) -> None:
    shipped, runs = tmp_path / "artefacts", tmp_path / "runs"
    two = artefact(shipped, "b-dms-cr2", "dms", cr=2)
    four = artefact(runs, "b-dms-cr4/final", "dms", cr=4)
    artefact(runs, "b-dms-cr2/final", "dms", cr=2)  # the first folder wins
    artefact(shipped, "other", "dms", base="c", cr=2)
    artefact(shipped, "both", "dms", cr=2, kv_heads=1)  # pooled too: by its folder only
    pooled = artefact(shipped, "b-gqa", "gqa", kv_heads=1)
    (shipped / "broken").mkdir()
    (shipped / "broken/cachefold.json").write_text("{")
    options = {"crs": (2.0, 4.0), "folders": (shipped, runs)}
    found = parse_methods(["dms", "gqa+int4"], Naming(base="b", **options))
    assert [(m.name, m.artefact) for m in found[1:]] == [
        ("dms-cr2", two), ("dms-cr4", four), ("gqa+int4", pooled),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"no artefact of it at cr 8 for b \(there: cr 2, 4\)"):
        parse_methods(["dms"], Naming(base="b", crs=(8.0,), folders=(shipped, runs)))
    artefact(shipped, "again", "dms", cr=2)
    with pytest.raises(ValueError, match="several artefacts are dms at cr 2: .*again"):
        parse_methods(["dms"], Naming(base="b", **options))


def test_what_was_trained_on_gives_way_to_what_came_of_it(tmp_path: Path) -> None:
    artefact(tmp_path, "a-cr2", cr=2)
    for name, init in (("b-dial", "a-cr2"), ("c-last/final", "b-dial")):
        place = artefact(tmp_path, name, cr=4, max_cr=8)
        (place / "recipe.yaml").write_text(f"init: artefacts/{init}\n")
    options = {"crs": (2.0, 4.0), "folders": (tmp_path,)}
    found = parse_methods(["dmc"], Naming(base="b", **options))[1:]
    assert [m.artefact for m in found] == [place, place]
    apart = artefact(tmp_path, "d-cr2", cr=2)
    assert parse_methods(["dmc-cr2"], Naming(base="b", **options))[1].artefact == apart
    artefact(tmp_path, "e-dial", cr=4, max_cr=8)
    with pytest.raises(ValueError, match="several artefacts are dmc at cr 4: .*c-last.*e-dial;"):
        parse_methods(["dmc-cr4"], Naming(base="b", **options))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"init: [a", "expected ',' or ']'"),
        (b"\xff", "decode"),
        (b"- init", "not a recipe"),
        (b"init: [a]", "not a recipe"),
    ],
)
def test_a_broken_recipe_that_decides_is_told(tmp_path: Path, text: bytes, reason: str) -> None:
    artefact(tmp_path, "a-cr2", cr=2)
    recipe = artefact(tmp_path, "b-dial", cr=4, max_cr=8) / "recipe.yaml"
    recipe.write_bytes(text)
    naming = Naming(base="b", crs=(2.0,), folders=(tmp_path,))
    # Without it the one made for the ratio would win, whether or not the dial came of it.
    with pytest.raises(ValueError) as caught:
        parse_methods(["dmc"], naming)
    assert str(recipe) in str(caught.value) and reason in str(caught.value)
    assert "name the folder" in str(caught.value)
    assert parse_methods(["dmc-cr4"], naming)[1].artefact == recipe.parent  # nothing to decide
    recipe.unlink()  # an import has none
    assert parse_methods(["dmc"], naming)[1].artefact == tmp_path / "a-cr2"


def test_a_recipe_that_is_no_file_is_told(tmp_path: Path) -> None:
    artefact(tmp_path, "a-cr2", cr=2)
    (artefact(tmp_path, "b-dial", cr=4, max_cr=8) / "recipe.yaml").mkdir()
    with pytest.raises(ValueError, match="b-dial/recipe.yaml can't be read: .*directory"):
        parse_methods(["dmc"], Naming(base="b", folders=(tmp_path,)))


def test_shipped_artefacts_are_found_by_the_name_of_their_policy() -> None:
    naming = Naming(base="smollm2-135m", crs=(2.0, 4.0, 8.0), folders=(SHIPPED,))
    found = parse_methods(["dmc", "dms"], naming)[1:]
    single = {method.name: method.artefact.name for method in found if not method.dial}
    assert len(found) == 6 and single == {"dmc-cr8": "smollm2-135m-cr8"}


def test_of_dials_the_one_with_the_widest_range_is_meant(tmp_path: Path) -> None:
    artefact(tmp_path, "a-dial", cr=4, max_cr=8)
    artefact(tmp_path, "b-dial", cr=4, max_cr=12)
    naming = Naming(base="b", crs=(2.0, 8.0, 10.0), folders=(tmp_path,))
    assert {m.artefact.name for m in parse_methods(["dmc"], naming)[1:]} == {"b-dial"}
    artefact(tmp_path, "c-dial", cr=2, max_cr=12)
    with pytest.raises(ValueError, match="several artefacts are dmc at cr 2: .*b-dial.*c-dial"):
        parse_methods(["dmc"], naming)


def test_artefacts_by_folder(tmp_path: Path) -> None:
    one = artefact(tmp_path, "runs/mine/final", cr=3)
    plus = artefact(tmp_path, "with+plus", "dms", cr=2)
    found = parse_methods([f"{one}+int4", str(one), str(plus)], Naming(base="b"))
    assert [(m.name, m.policy, m.cr, m.codec) for m in found[1:]] == [
        ("mine+int4", "dmc", 3, "int4"), ("mine", "dmc", 3, None), ("with+plus", "dms", 2, None),
    ]  # fmt: skip
    by_name = Naming(base="b", crs=(3.0,), folders=(tmp_path / "runs",))
    assert [m.name for m in parse_methods([str(one), "dmc"], by_name)] == ["dense", "mine"]
    twin = artefact(tmp_path, "other/mine", cr=3)
    with pytest.raises(ValueError, match="would both be called mine"):
        parse_methods([str(one), str(twin)], Naming(base="b"))
    with pytest.raises(ValueError, match="belongs to the base model b, not to c"):
        parse_methods([str(one)], Naming(base="c"))


def test_a_folder_of_one_ratio_says_what_it_is_not_measured_at(tmp_path: Path) -> None:
    two = artefact(tmp_path, "mine/final", cr=2)
    dial = artefact(tmp_path, "dial", cr=4, max_cr=8)
    pooled = artefact(tmp_path, "pooled", "gqa", kv_heads=1)

    def told(words: str, *crs: float, strict: bool = True) -> list[str]:
        naming = Naming(base="b", crs=crs, folders=(tmp_path,))
        found = parse_methods(words.split(","), naming)
        return of_one_ratio(words.split(","), found, crs, strict=strict)

    line = "mine has one ratio and is measured at 2 only, not at {}."
    assert told(f"{two},{two}+int4,tova", 2, 4, 8) == [line.format("4, 8")]
    assert told(f"{two},{dial}", 4) == told(f"{two},tova-cr4", 4) == [line.format("4")]
    assert told(f"{two}", 2, 4) == told(f"{two}", 4, strict=False) == [line.format("4")]
    for silent in (f"{two},tova", f"{dial},dmc-cr2,{pooled},full+int4"):
        assert told(silent, 2) == []
    assert told("dmc-cr2,tova", 4) == []  # its name is the ratio it was asked for
    with pytest.raises(ValueError, match="final has one ratio, 2, and nothing named takes --cr 4"):
        told(f"{two},full+int4,{pooled}", 4)


def test_a_missing_artefact_comes_with_its_command(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`cachefold retrofit RECIPE.yaml model=hub/b policy"):
        parse_methods(["dmc"], Naming(base="hub/b"))
    (tmp_path / "recipes").mkdir()
    recipes = {
        "a-dms-cr2": "other, policy: {name: dms}", "b-dmc": "hub/b, policy: {name: dmc}",
        "b-dms-dial": "hub/b, policy: {name: dms, max_cr: 8}",
        "b-dms-cr2": "hub/b, policy: {name: dms}",
        "b-dms-on": "hub/b, init: a, policy: {name: dms}",
        "a-pooled": "hub/b, policy: {name: dms, kv_heads: 1}",
    }  # fmt: skip
    for name, values in recipes.items():
        (tmp_path / f"recipes/{name}.yaml").write_text(f"{{model: {values}}}")
    (tmp_path / "recipes/a-broken.yaml").write_text("{")
    with pytest.raises(ValueError) as caught:
        parse_methods(["dms"], Naming(base="hub/b", crs=(4.0,)))
    assert str(caught.value).endswith(
        "`cachefold retrofit recipes/b-dms-cr2.yaml model=hub/b policy.name=dms policy.cr=4 "
        "output_dir=runs/b-dms-cr4`"
    )


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tovaa", "unknown method 'tovaa'. Did you mean 'tova'?"),
        ("tova+int5", "unknown codec 'int5'. Did you mean"),
        ("dense+int4", r"full\+int4 keeps every entry in int4"),
        ("tova-cr0.5", "at least 1, such as 2; got '0.5'"),
        ("full-cr2", "unknown method 'full-cr2'. Did you mean 'full'"),
        ("dmd", "unknown method 'dmd'. Did you mean 'dm"),
    ],
)
def test_unknown_names_teach(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_methods([word], Naming(base="b"))


def test_the_closest_artefact_is_named(tmp_path: Path) -> None:
    artefact(tmp_path, "mine-cr2", cr=2)
    with pytest.raises(ValueError, match=f"Did you mean '{tmp_path}/mine-cr2'"):
        parse_methods([f"{tmp_path}/mine-cr3"], Naming(base="b", folders=(tmp_path,)))


def test_codecs() -> None:
    assert codecs_of([]) == (None,) and codecs_of(["int4", "int4", "none"]) == ("int4", None)
    with pytest.raises(ValueError, match="unknown codec 'itn4'. Did you mean 'int4'"):
        codecs_of(["itn4"])
    assert not is_artefact("nowhere")


def test_examples_run() -> None:
    assert doctest.testmod(module).attempted and not doctest.testmod(module).failed
