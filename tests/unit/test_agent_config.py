"""agent.toml: the documented template covers every key, and every fault names file, line and key."""

import datetime
import re
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from pydantic import BaseModel

from fedpact_client import config
from fedpact_client.config import AgentConfig, fill_template, load, parse, set_value, template
from fedpact_contract.errors import InputError
from fedpact_contract.toml_lines import locate

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
AGENT = {"name": "Example Hospital", "entity_code": "91310000MA1K000000", "sector": "medical"}


def uncommented(text: str, *leave: str) -> str:
    """The template with its optional keys switched on; `#key` is a key, `# text` is a comment."""
    lines = []
    for line in text.splitlines():
        key = re.match(r"#([A-Za-z_\[][^ =]*)", line)
        lines.append(line[1:] if key and key.group(1) not in leave else line)
    return "\n".join(lines) + "\n"


DATABASE = ("host", "port", "database", "user", "password_file", "password_env", "tls", "ca_file")
"""Keys of a source that is a database."""


def whole() -> str:
    """A configuration with one data set and every key that goes with a headerless CSV file."""
    return uncommented(template(), "release_file", "table", "query", *DATABASE)


def changed(old: str, new: str) -> str:
    text = whole()
    assert text.count(old) == 1, old
    return text.replace(old, new)


def test_the_copy_in_the_package_is_the_documented_one() -> None:
    assert template() == (CONFIGS / "agent.toml").read_text("utf-8")


def test_a_fresh_configuration_is_read_and_allows_nothing(tmp_path: Path) -> None:
    text = fill_template(AGENT, datetime.date(2031, 3, 1))
    fresh = parse(text, tmp_path / "agent.toml")
    assert fresh.agent.plain() == AGENT
    assert fresh.operator.url == ""
    assert fresh.data_sets == ()
    assert fresh.policy.purposes == ()
    assert fresh.policy.not_after == "2033-02-28T23:59:59Z", "two years, whenever it is installed"
    assert fresh.paths.witness is None


def test_every_key_stands_in_the_template_with_a_comment_above() -> None:
    lines = template().splitlines()
    for path in model_keys(AgentConfig):
        key = path[-1]
        places = [i for i, line in enumerate(lines) if re.match(rf"#?(\[+[a-z_.]*)?{key}\b[\] =]", line)]
        assert places, f"{path} is not documented"
        headers_need_none = all(lines[i].lstrip("#").startswith("[") for i in places)
        assert headers_need_none or all(lines[i - 1].startswith("# ") for i in places), f"{path} has no comment"


def model_keys(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield (*path, name)
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from model_keys(kind, (*path, name))


def test_the_template_switched_on_is_valid(tmp_path: Path) -> None:
    read = parse(whole(), tmp_path / "agent.toml")
    data_set = read.data_set("heart-2026")
    assert (data_set.epsilon, data_set.delta) == (Decimal(8), Decimal("0.00001"))
    assert data_set.release_fraction == Decimal("0.05")
    assert data_set.source.rename == {"chest_pain": "cp"}
    assert read.paths.witness == "/var/lib/fedpact-witness/head"
    files = uncommented(template(), "release_fraction", "table", "query", *DATABASE)
    assert parse(files, tmp_path / "agent.toml").data_set("heart-2026").release_file == str(
        tmp_path / "data/released.csv"
    )


def test_a_relative_witness_is_taken_from_the_files_folder(tmp_path: Path) -> None:
    text = changed('"/var/lib/fedpact-witness/head"', '"../witness/head"')
    assert parse(text, tmp_path / "agent.toml").paths.witness == f"{tmp_path}/../witness/head"


@pytest.mark.parametrize(
    ("old", "new", "line_of", "code"),
    [
        ("threads = 2", 'threads = "2"', "threads =", "CONFIG"),
        ("threads = 2", "threads = 0", "threads =", "CONFIG"),
        ("threads = 2", "threads = 2\nspeed = 9", "speed =", "CONFIG_UNKNOWN_KEY"),
        ("threads = 2", "", "[limits]", "CONFIG_MISSING_KEY"),
        ("[limits]", "[limit]", "[limit]", "CONFIG_UNKNOWN_KEY"),
        ('url = ""', 'url = "http://operator:1"', "url =", "CONFIG"),
        ('url = ""', 'url = "https://operator:1/path"', "url =", "CONFIG"),
        ('url = ""', 'url = "https://user:pw@operator"', "url =", "CONFIG"),
        ('url = ""', 'url = "https://operator\\n"', "url =", "CONFIG"),
        ("num_examples = 5000", "num_examples = 5000.0", "num_examples =", "CONFIG"),
        ("num_examples = 5000", "num_examples = true", "num_examples =", "CONFIG"),
        ("epsilon = 8", "epsilon = 0", "epsilon =", "CONFIG"),
        ("epsilon = 8", "epsilon = nan", "epsilon =", "CONFIG"),
        ("delta = 0.00001", "delta = 1", "delta =", "CONFIG"),
        ("release_fraction = 0.05", "release_fraction = 0.51", "release_fraction =", "CONFIG"),
        ("release_fraction = 0.05", "release_fraction = 0", "release_fraction =", "CONFIG"),
        ("release_fraction = 0.05", 'release_fraction = 0.05\nrelease_file = "x"', "[[data_sets]]", "CONFIG"),
        ('label = "disease"', 'label = "age"', "[[data_sets]]", "CONFIG"),
        ('id = "heart-2026"', 'id = "heart 2026"', "id =", "CONFIG"),
        ('kind = "csv"', 'kind = "xlsx"', "kind =", "CONFIG"),
        ('kind = "csv"', 'kind = "sqlite"', "[data_sets.source]", "CONFIG"),
        ('delimiter = ","', 'delimiter = ";;"', "delimiter =", "CONFIG"),
        ("max_epsilon = 3", 'max_epsilon = "3.0"', "max_epsilon =", "CONFIG"),
        ("not_after = 2027-12-31T23:59:59Z", "not_after = 2027-12-31", "not_after =", "CONFIG"),
        ("not_after = 2027-12-31T23:59:59Z", "not_after = 2027-12-31T23:59:59", "not_after =", "CONFIG"),
        ('operators = "enrolled"', 'operators = "any"', "operators =", "CONFIG"),
        ("patched = true", "patched = 1", "patched =", "CONFIG"),
    ],
)
def test_a_fault_names_its_line_and_key(tmp_path: Path, old: str, new: str, line_of: str, code: str) -> None:
    path = tmp_path / "agent.toml"
    text = changed(old, new)
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load(path)
    number = next(i for i, line in enumerate(text.splitlines(), 1) if line.startswith(line_of))
    assert caught.value.code == code
    assert ".." not in caught.value.message, "one full stop"
    assert caught.value.file == f"{path}:{number}"
    assert caught.value.field
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("epsilon = 8", "epsilom = 8", "Unknown key data_sets.0.epsilom; perhaps epsilon is meant."),
        ("release_fraction = 0.05", "colour = 0.05", "Unknown key data_sets.0.colour."),
        ("release_fraction = 0.05", "releasefraction = 0.05", "data_sets.0.releasefraction; perhaps release_fraction"),
        ("delimiter =", "delimeter =", "Unknown key data_sets.0.source.delimeter; perhaps delimiter is meant."),
        ("[limits]", "[limit]", "Unknown key limit; perhaps limits is meant."),
    ],
)
def test_a_misspelt_key_is_named_with_the_one_that_is_meant(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(changed(old, new), tmp_path / "agent.toml")
    assert caught.value.code == "CONFIG_UNKNOWN_KEY"
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("threads = 2", 'threads = "2"', "limits.threads: must be a whole number."),
        ("threads = 2", "threads = 0", "limits.threads: must be at least 1."),
        ("patched = true", "patched = 1", "network.patched: must be true or false."),
        (
            'kind = "csv"',
            'kind = "xlsx"',
            "data_sets.0.source.kind: must be 'csv', 'parquet', 'sqlite', 'ndjson', 'arrow', "
            "'postgresql' or 'mariadb'.",
        ),
        ('label = "disease"', "label = 3", "data_sets.0.label: must be text."),
        ('label = "disease"', 'label = ""', "data_sets.0.label: must not be empty."),
        ('id = "heart-2026"', 'id = "heart 2026"', "data_sets.0.id: must be one word of letters, digits, and . _ : -."),
        ('url = ""', 'url = "http://operator:1"', "operator.url: must be an address of the form https://host:port."),
        ('delimiter = ","', 'delimiter = ";;"', "data_sets.0.source.delimiter: has the wrong form."),
        ('operators = "enrolled"', 'operators = "*"', "policy.operators: must be a list or must be 'enrolled'."),
        ('sectors = "*"', 'sectors = "any"', "policy.sectors: must be a list or must be '*'."),
        ('rename = { chest_pain = "cp" }', "rename = { chest_pain = 3 }", "source.rename.chest_pain: must be text."),
        (
            "2027-12-31T23:59:59Z",
            "0001-01-01T00:00:00+14:00",
            "policy.not_after: must lie between the years 1 and 9999.",
        ),
        (
            '"/var/lib/fedpact-witness/head"',
            '"~nobody-of-that-name/head"',
            "paths.witness: begins with ~, and this system knows no such home folder: write it in full.",
        ),
    ],
)
def test_a_wrong_value_is_told_in_words(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(changed(old, new), tmp_path / "agent.toml")
    assert said in caught.value.message
    assert caught.value.rule in said


def test_two_data_sets_with_one_id_are_refused(tmp_path: Path) -> None:
    block = whole()[whole().index("[[data_sets]]") : whole().index("[policy]")]
    with pytest.raises(InputError, match="one id"):
        parse(whole().replace("[policy]", block + "[policy]"), tmp_path / "agent.toml")


def test_a_fault_in_the_second_data_set_names_its_line(tmp_path: Path) -> None:
    block = whole()[whole().index("[[data_sets]]") : whole().index("[policy]")]
    second = block.replace("heart-2026", "heart-2027").replace('kind = "csv"', 'kind = "doc"')
    text = whole().replace("[policy]", second + "[policy]")
    with pytest.raises(InputError) as caught:
        parse(text, tmp_path / "agent.toml")
    number = [i for i, line in enumerate(text.splitlines(), 1) if line.startswith("kind =")][1]
    assert caught.value.file == f"{tmp_path / 'agent.toml'}:{number}"
    assert caught.value.field == "data_sets.1.source.kind"


@pytest.mark.parametrize(
    ("content", "code", "line"),
    [
        (b"\xff", "CONFIG_FILE", ""),
        (b"a = \n", "TOML_SYNTAX", ":1"),
        (b"\n\na = 1\na = 2\n", "TOML_SYNTAX", ":4"),
        (b'[agent]\nname = "A\nsector = 1\n', "TOML_SYNTAX", ":2"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes, code: str, line: str) -> None:
    path = tmp_path / "agent.toml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load(path)
    assert (caught.value.code, caught.value.file) == (code, f"{path}{line}")


def test_a_column_that_stands_twice_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the column age stands twice"):
        parse(changed('label = "disease"', 'label = "age"'), tmp_path / "agent.toml")


def test_twenty_thousand_columns_are_read_in_a_moment() -> None:
    columns = tuple(f"c{number}" for number in range(20_000))
    values = {"id": "x", "num_examples": 1, "epsilon": 1, "delta": "0.00001", "columns": columns, "label": "ill"}
    began = time.process_time()
    config.DataSet.parse(values | {"source": {"path": "x.csv", "kind": "csv"}}, code="TEST")
    assert time.process_time() - began < 2


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="CONFIG_FILE"):
        load(tmp_path / "agent.toml")


def test_an_unknown_data_set_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="heart-2026") as caught:
        parse(whole(), tmp_path / "agent.toml").data_set("lungs")
    assert caught.value.code == "CONFIG_DATA_SET"


def test_a_value_is_replaced_and_every_comment_kept() -> None:
    url = "https://fl.example.cn:8443"
    text = set_value(template(), "operator", "url", url)
    assert parse(text, Path("agent.toml")).operator.url == url
    assert [line for line in text.splitlines() if not line.startswith("url")] == [
        line for line in template().splitlines() if not line.startswith("url")
    ]


@pytest.mark.parametrize(("table", "key"), [("operator", "address"), ("nothing", "url"), ("agent", "url")])
def test_a_value_that_is_not_there_cannot_be_replaced(table: str, key: str) -> None:
    with pytest.raises(InputError, match="CONFIG_KEY"):
        set_value(template(), table, key, "x")


@pytest.mark.parametrize(
    ("field", "line"),
    [("a.b", 2), ("a.c", 1), ("list.0.x", 4), ("list.1.x", 6), ("list.1.sub.y", 8), ("list.2.x", None), ("", None)],
)
def test_locate(field: str, line: int | None) -> None:
    text = "[a]\nb = 1\n[[list]]\nx = 1\n[[list]]\nx = 2\n[list.sub]\ny = 3\n"
    assert locate(text, field) == line


def test_the_url_of_an_ipv6_host_is_read() -> None:
    assert config.OperatorPart.parse({"url": "https://[::1]:8443"}, code="URL").url == "https://[::1]:8443"


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_the_template_can_name_a_database(tmp_path: Path, kind: str) -> None:
    files = ("path", "table", "column_names", "delimiter", "release_file", "password_env")
    text = uncommented(template(), *files).replace('kind = "csv"', f'kind = "{kind}"')
    source = parse(text, tmp_path / "agent.toml").data_set("heart-2026").source
    assert (source.is_database, source.tcp_port, source.tls) == (True, 5432, True)
    assert source.password_file == "secrets/clinic.password"
