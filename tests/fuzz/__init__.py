"""Whatever comes from a server, fed to what takes it apart. `targets` has what must hold; pytest and atheris run it."""
