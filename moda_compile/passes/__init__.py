"""The passes, one file each. A pass is ``run(gm, plan)``; passes know nothing of one another."""
