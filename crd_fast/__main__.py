from crd_fast.cli import run

run()
