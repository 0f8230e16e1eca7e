package nodedns

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What a query and its answer cost the processor, the client and whoever answers included,
// by way of the agent, relayed by it (which in a test takes a thread), and without the layer. It is measured, not promised: it
// must merely not be ten times as much.
func TestCostOfAQuery(t *testing.T) {
	o := newOutpost(t)
	o.serveElsewhere()
	cost := func(name string, total int) time.Duration {
		c := o.client(o.NetNS, "udp4", dns4, true)
		var before, after unix.Rusage
		must(t, unix.Getrusage(unix.RUSAGE_SELF, &before))
		for range total {
			if _, _, err := c.ask(t, 7, name); err != nil {
				t.Fatal(err)
			}
		}
		must(t, unix.Getrusage(unix.RUSAGE_SELF, &after))
		return time.Duration(after.Utime.Nano()+after.Stime.Nano()-before.Utime.Nano()-before.Stime.Nano()) / time.Duration(total)
	}
	without := cost("web.", 2000)
	l := o.open()
	left := cost("web.", 2000)
	o.serve(l, knows)
	answered, relayed := cost("web.", 2000), cost("unknown.", 200)
	t.Logf("a query costs %v without the layer, %v where it leaves it, %v answered by the agent, %v relayed", without, left, answered, relayed)
	if answered > 10*without || left > 3*without {
		t.Error("that is too much")
	}
}
