// Package cause names why packets died: from Evidence, which is everything that
// was seen in a window of time, it makes Verdicts.
//
// It is pure: no clock, no files, no root, and nothing in it knows a lab's
// addresses, ports or names. It writes nothing in the kernel. It costs some
// microseconds an event and a namespace.
package cause
