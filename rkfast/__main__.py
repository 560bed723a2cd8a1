from rkfast.cli import main

raise SystemExit(main())
