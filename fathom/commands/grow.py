"""`fathom world grow`: a world whose theories a grammar writes."""

from pathlib import Path

from tyro.conf import Positional

from fathom.commands.output import Function
from fathom.errors import UserError


def grow() -> Function:
    def run(world: Positional[Path], out: Positional[Path], steps: int = 1200, seed: int = 0) -> None:
        """Write the theories of a world's `grammar:` out: all of up to 500, else those that a trained sampler finds.

        Args:
            world: A world file with `grammar:` in place of `theories:`.
            out: The file to write, .yaml or .json.
            steps: Of training the sampler.
            seed: Of the sampler.
        """
        import json

        from fathom.scientist import grammar as grammars
        from fathom.scientist.document import read_document

        if out.exists() or out.suffix not in (".yaml", ".json"):
            raise UserError(f"{out}: give the name of a new .yaml or .json file")
        if not world.is_file():
            raise UserError(f"there is no file {world}")
        document, issues = read_document(world)
        issues.check()
        given = grammars.grammar(document)
        if given.count <= grammars.MOST:
            choices, how = list(given.choices()), f"all {given.count} theories of a grammar"
        else:
            from fathom.scientist.gflownet import found, train

            trained = train([len(slot) for slot in given.slots], grammars.weigher(given), steps=steps, seed=seed)
            choices, share = found(trained, grammars.MOST)
            how = (
                f"{len(choices)} of {given.count} theories of a grammar, chosen by the evidence: they hold {share:.4f} of the "
                f"weight of the {len(trained.weighed)} that a sampler tried; the others are left out"
            )
        made = given.world(choices)
        made["notes"] = f"{made.get('notes', '')} Theories: {how}.".strip()
        if out.suffix == ".json":
            out.write_text(json.dumps(made, indent=1) + "\n")
        else:
            import yaml

            out.write_text(yaml.safe_dump(made, sort_keys=False, width=130))
        from fathom.scientist import read

        print(f"{how}: world {read(out).hash[:12]}")

    return run
