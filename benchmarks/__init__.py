"""What the project costs, and what it is worth: measurements that the documents show."""

from interrupts import end_at_once_where_started

end_at_once_where_started()
