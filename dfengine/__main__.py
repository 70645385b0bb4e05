from dfengine.cli import main

main()
