from crd_fast.cli import main

main()
