"""A process as a rank of a job: how it enters the job, trains in it and leaves it, and how local ranks are started."""
