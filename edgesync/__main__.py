from edgesync.cli.main import main

main()
