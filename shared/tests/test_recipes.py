"""Packaged recipes by name."""

import pytest

from tenfold.errors import UserError
from tenfold.recipes import recipe_files, recipe_parts


@pytest.mark.usefixtures("toy_root")
def test_a_recipe_is_read_by_name():
    assert list(recipe_files("toy")) == ["big", "demo"]
    assert recipe_parts("toy", "big") == {"trainer": {"max_steps": 4}}
    with pytest.raises(UserError, match="no recipe is called 'huge': choose from big, demo"):
        recipe_parts("toy", "huge")


def test_a_package_without_recipes_has_none():
    assert recipe_files("tenfold") == {}
    with pytest.raises(UserError, match="choose from none"):
        recipe_parts("tenfold", "demo")
