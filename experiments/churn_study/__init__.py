"""What `experiments.churn` is made of: studies of prediction churn.

A study, from the top down:

  worker            trains all runs that are not done, one after another
  training          trains one run and asks it for its predictions
  run_files         which runs there are, and the files that they leave
  results           predictions -> a row of figures for each arm; the weight
                    that is chosen

Files of anybody's models, in place of a study:

  comparison        the flags, and what is made of the files
  prediction_files  reads .npy, .csv and .parquet, and joins them

`studies.churn_page` prints and writes what came out of both.

Only `training` and `worker` need jax.
"""
