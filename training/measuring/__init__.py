"""What solvers do to images, in numbers: measurements, intervals, comparisons and their reports."""
