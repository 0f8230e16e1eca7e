// Package agent is the loop on each node: a Snapshot comes from the source,
// every layer plans, the difference to what is in force is applied, and what
// happened is told in status, metrics and the log.
//
// The agent is not in the path of any packet. It may be killed, restarted or
// upgraded: what the layers left in the kernel goes on working, and the next
// agent takes it over. Nothing is removed from the kernel before the source has
// seen the cluster whole once.
//
// It writes nothing in the kernel itself (the layers do); on disk it makes a
// run folder with a lock and a Unix socket, mode 0700 and 0600.
//
// It costs about 25 MB of memory and no processor time while nothing changes,
// but for one reading of the layers' state a minute (the drift check).
package agent
