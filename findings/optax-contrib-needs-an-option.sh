#!/usr/bin/env bash
# optax 0.2.7 and jax 0.10: `import optax.contrib` raises, though pip finds that the two fit.
#
# The module sets the option jax_pmap_shmap_merge when it is imported, which JAX 0.10 no longer has. optax 0.2.7 asks for
# jax>=0.5.3 without an upper bound, and 0.2.6 as well as 0.2.8 can be imported; so a range such as optax>=0.2.6 has a
# hole in it, which shows only to those who have the version between.
#
# Seen (jax 0.10.2):
#   optax 0.2.6: imported
#   optax 0.2.7: AttributeError: Unrecognized config option: jax_pmap_shmap_merge
#   optax 0.2.8: imported
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
pip=("$directory/venv/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$directory/import.py" <<'END'
import importlib.metadata
import sys

try:
    import optax.contrib  # noqa: F401
except AttributeError as error:
    said = f"AttributeError: {error}"
else:
    said = "imported"
print(f"optax {importlib.metadata.version('optax')}: {said}")
expected = "AttributeError: Unrecognized config option: jax_pmap_shmap_merge" if sys.argv[1] == "raises" else "imported"
raise SystemExit(said != expected)
END
for expected in "0.2.6 imports" "0.2.7 raises" "0.2.8 imports"; do
    read -r version what <<< "$expected"
    "${pip[@]}" "optax==$version"
    JAX_PLATFORMS=cpu "$directory/venv/bin/python" "$directory/import.py" "$what"
done
