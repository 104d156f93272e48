"""A data set's card as JSON-LD by Croissant 1.1 (https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html).

The rows cannot be had, so the description has neither files nor record sets: it says what the data set is, whose, by
which rights, and where to ask. Quality codes and what else Croissant has no word for stand under the prefix `fedpact`.
"""

import json
from typing import Any

from fedpact_contract.errors import InputError
from fedpact_contract.messages import DataSetCard
from fedpact_contract.quality import FACTS, ITEMS, Facts

CONFORMS_TO = "http://mlcommons.org/croissant/1.1"
NAMESPACE = "urn:fedpact:card:v1:"
"""Prefix of our own terms; an identifier, not an address."""
REQUIRED = {
    "name": "title",
    "description": "description",
    "license": "license",
    "url": "url",
    "creator": "creator",
    "datePublished": "published",
}
"""What Croissant asks for besides @context, @type and conformsTo, and which declared fact it is."""

_TERMS = (
    "citeAs", "column", "extract", "field", "fileObject", "fileProperty", "fileSet", "format", "includes",
    "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex", "repeated",
    "replace", "samplingRate", "separator", "source", "subField", "transform", "equivalentProperty",
)  # fmt: skip
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{term: f"cr:{term}" for term in _TERMS},
    "fedpact": NAMESPACE,
}
"""The context that the specification gives, whole (its validator warns of another), and our prefix."""


def croissant(card: DataSetCard) -> dict[str, Any]:
    """The card as a JSON-LD object.

    Raises:
        InputError: CARD_CROISSANT, the card does not declare something that Croissant requires.
    """
    facts = card.facts or Facts()
    if lacking := [fact for fact in REQUIRED.values() if getattr(facts, fact) is None]:
        raise InputError(
            "CARD_CROISSANT",
            f"Croissant requires {', '.join(lacking)}, which the card does not declare.",
            field=f"data_sets.card.{lacking[0]}",
            party=card.participant,
            rule="required properties of Croissant 1.1",
            remedy="Declare it under [data_sets.card] in agent.toml, and sign a new card with `fedpact-agent card`.",
        )
    said = facts.plain()
    own = {name: value for name, value in said.items() if name not in REQUIRED.values()}
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        **{key: said[fact] for key, fact in REQUIRED.items()},
        "creator": {"@type": "sc:Organization", "name": said["creator"]},
        "identifier": f"{NAMESPACE}{card.digest()}",
        "fedpact:dataSet": card.data_set,
        "fedpact:participant": card.participant,
        "fedpact:numExamples": card.num_examples,
        "fedpact:columns": list(card.columns),
        "fedpact:label": card.label,
        "fedpact:quality": [
            *({"fedpact:tc609": FACTS[name][0], "fedpact:item": name} for name in said),
            *(
                {
                    "fedpact:tc609": ITEMS[m.item][0],
                    "fedpact:item": m.item,
                    "fedpact:atLeast": m.at_least,
                    "fedpact:basis": m.basis,
                }
                for m in card.measured or ()
            ),
        ],
        **{f"fedpact:{name}": value for name, value in own.items()},
    }


def croissant_bytes(card: DataSetCard) -> bytes:
    """The same as a file, UTF-8.

    Raises:
        InputError: CARD_CROISSANT.
    """
    return json.dumps(croissant(card), ensure_ascii=False, indent=2).encode() + b"\n"
