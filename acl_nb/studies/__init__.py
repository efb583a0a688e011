"A question answered by many runs: `studies.specs` asks it, `studies.run` trains, `studies.tables` reads."
