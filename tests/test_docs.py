"""Pages that say what the code says."""

from crd_fast.config import Recipe
from crd_fast.sections import Section
from tools.settings_page import PAGE, page


def test_settings_page_is_the_schema():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tools.settings_page"


def test_every_key_is_explained():
    for section, field in Recipe.model_fields.items():
        kind = field.annotation
        inner = (
            kind.model_fields if isinstance(kind, type) and issubclass(kind, Section) else {section: field}
        )
        for name, key in inner.items():
            assert len(key.description or "") > 5, f"{section}.{name}"
