"""Command lines beside the main ones."""

from interrupts import end_at_once_where_started

end_at_once_where_started()
