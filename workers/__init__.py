"""One file = one supervisord program: patch gevent, build the parts, hand them to the skeleton."""
