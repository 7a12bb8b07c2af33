"""Recipes and the table of commands."""

from ds_net_plus.cli import app


def test_every_command_is_in_the_table(capsys):
    assert app.main(["--help"]) == 0
    told = capsys.readouterr().out
    for command in ("demo", "fit", "predict", "train-gate", "explain", "convert-checkpoint"):
        assert f"  {command} " in told


def test_recipes_are_listed_with_what_they_are_for(capsys):
    assert app.main(["recipes"]) == 0
    told = capsys.readouterr().out
    for name in ("demo", "imagenet", "cifar10", "cifar100", "cifar10-transfer"):
        assert name in told
    assert "150 epochs" in told
