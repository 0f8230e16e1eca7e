package trace

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/sockdiag"
	"github.com/millrace/millrace/layer/trace/cause"
)

// A namespace that cannot be read, as the kernel keeps the reader waiting, does not keep the
// others, nor the whole, for longer than there is time.
func TestReadingEndsInTime(t *testing.T) {
	var own unix.Stat_t
	if err := unix.Stat("/proc/self/ns/net", &own); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	stuck := make(chan struct{})
	defer close(stuck)
	var all []Namespace
	for i := range 50 {
		all = append(all, Namespace{Name: fmt.Sprint(i), Inode: uint32(own.Ino)})
	}
	kept := 0
	unread, err := each(ctx, all, func(n Namespace) int {
		if n.Name == "7" {
			<-stuck
		}
		return 1
	}, func(_ Namespace, one int) { kept += one })
	if err != nil || kept != len(all)-1 || unread != 1 {
		t.Errorf("%d of %d namespaces are read, %d are not: %v", kept, len(all), unread, err)
	}
}

// Of too many namespaces those are read in which something happened, and then those that can
// be compared.
func TestWhichNamespacesAreRead(t *testing.T) {
	r := &Reader{before: map[uint32]*beginning{}, missing: map[string]bool{}}
	const spaces = mostSpaces + 500
	for i := range uint32(spaces) {
		r.spaces = append(r.spaces, Namespace{Inode: i})
	}
	first := r.chosen(nil)
	if len(first) != mostSpaces || first[0].Inode != 0 || first[mostSpaces-1].Inode != mostSpaces-1 {
		t.Errorf("before the window %d are read, not the first %d", len(first), mostSpaces)
	}
	for _, n := range first[:mostSpaces-1] {
		r.before[n.Inode] = &beginning{}
	}
	then := r.chosen(map[uint32]bool{spaces - 1: true})
	if len(then) != mostSpaces || then[0].Inode != spaces-1 || then[1].Inode != 0 || then[mostSpaces-1].Inode != mostSpaces-2 {
		t.Errorf("after it %d are read: %v ... %v", len(then), then[:2], then[mostSpaces-1])
	}
	said := fmt.Sprintf("counters, sockets, devices and rules of 500 of %d network namespaces", spaces)
	if len(r.missing) != 1 || !strings.HasPrefix(slices.Collect(maps.Keys(r.missing))[0], said) {
		t.Errorf("what is left out is not told: %v", r.missing)
	}
}

func TestRoom(t *testing.T) {
	var r room
	r.left.Store(100)
	for i, row := range []struct{ n, least, want int }{{60, 10, 60}, {60, 10, 40}, {60, 10, 10}, {5, 10, 5}, {5, 0, 0}} {
		if got := r.take(row.n, row.least); got != row.want {
			t.Errorf("%d: room for %d, not %d", i, got, row.want)
		}
	}
}

// What an event is about comes before what is in trouble, and that before the rest.
func TestWhichSocketsMatter(t *testing.T) {
	end := func(text string) netip.AddrPort { return netip.MustParseAddrPort(text) }
	m := meet([]cause.Event{{Space: 1, Socket: 99, Tuple: cause.Tuple{Source: end("10.0.0.1:40000"), Destination: end("10.0.0.2:80")}}})
	nobody := end("0.0.0.0:0")
	for _, row := range []struct {
		what string
		s    sockdiag.State
		rank int
	}{
		{"the listener that an event is about", sockdiag.State{Protocol: unix.IPPROTO_TCP, State: tcpListen, Local: end("0.0.0.0:80"), Remote: nobody}, 0},
		{"the socket that an event is about", sockdiag.State{Protocol: unix.IPPROTO_TCP, State: tcpEstablished, Cookie: 99, Local: end("10.0.0.1:40000"), Remote: end("10.0.0.2:80")}, 0},
		{"another listener", sockdiag.State{Protocol: unix.IPPROTO_TCP, State: tcpListen, Local: end("0.0.0.0:81"), Remote: nobody}, 2},
		{"a listener that does not accept", sockdiag.State{Protocol: unix.IPPROTO_TCP, State: tcpListen, ReceiveQueue: 3, Local: end("0.0.0.0:81"), Remote: nobody}, 1},
		{"a connection that sends again", sockdiag.State{Protocol: unix.IPPROTO_TCP, State: tcpEstablished, Timer: sockdiag.TimerRetransmit, Tries: 2, Local: end("10.0.0.1:5"), Remote: end("10.0.0.2:6")}, 1},
		{"a connection that is well", sockdiag.State{Protocol: unix.IPPROTO_TCP, State: tcpEstablished, Local: end("10.0.0.1:5"), Remote: end("10.0.0.2:6")}, -1},
		{"one that is over", sockdiag.State{Protocol: unix.IPPROTO_TCP, State: tcpTimeWait, Local: end("10.0.0.1:5"), Remote: end("10.0.0.2:6")}, -1},
		{"a UDP socket", sockdiag.State{Protocol: unix.IPPROTO_UDP, Local: end("0.0.0.0:53"), Remote: nobody}, 2},
		{"a UDP socket that had no room", sockdiag.State{Protocol: unix.IPPROTO_UDP, Drops: 4, Local: end("0.0.0.0:53"), Remote: nobody}, 1},
	} {
		if got := m.rank(row.s); got != row.rank {
			t.Errorf("%s: rank %d, not %d", row.what, got, row.rank)
		}
	}
}

// What a socket had dropped before the window is known, although the socket was not kept.
func TestDropsOfSocketsThatWereNotKept(t *testing.T) {
	b := &beginning{drops: map[uint64]uint64{1: 10, 2: 20}}
	b.Sockets = []cause.Socket{{Cookie: 1, Drops: 10}}
	got := b.dropped([]cause.Socket{{Cookie: 1, Drops: 11}, {Cookie: 2, Drops: 25}, {Cookie: 3, Drops: 5}})
	if len(got) != 2 || got[0].Drops != 10 || got[1].Cookie != 2 || got[1].Drops != 20 {
		t.Errorf("%+v", got)
	}
}
