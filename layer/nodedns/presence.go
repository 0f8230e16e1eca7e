package nodedns

import (
	"cmp"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// presence is what the programs know of the agent, and what they keep for it. It is the
// server's own, so that the datapath may be closed.
type presence struct {
	presences, listeners, waiting *ebpf.Map
	keep                          *ebpf.Program

	mu            sync.Mutex // guards what follows
	aside, ending bool
	// rests is until when it is aside for the sake of who lost a query to the one before.
	rests time.Time
}

// presence implements host.
func (d *datapath) presence() (*presence, error) {
	p := &presence{}
	var err error
	for name, own := range map[string]**ebpf.Map{
		datapathMapPresences: &p.presences, datapathMapListeners: &p.listeners, datapathMapWaiting: &p.waiting,
	} {
		if *own, err = d.maps[name].Clone(); err != nil {
			p.close()
			return nil, fmt.Errorf("open map %s: %w", name, err)
		}
	}
	if p.keep, err = d.programs[datapathProgDnsKeep].Clone(); err != nil {
		p.close()
		return nil, fmt.Errorf("open program %s: %w", datapathProgDnsKeep, err)
	}
	if err := p.rest(cmp.Or(d.settings.rest, restAfter)); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// rest begins aside where the agent before was killed just now, and did not end by itself.
func (p *presence) rest(after time.Duration) error {
	var before datapathPresence
	if err := p.presences.Lookup(uint32(0), &before); err != nil {
		return fmt.Errorf("read when the agent before was there: %w", err)
	}
	now, err := sinceBoot()
	if err != nil {
		return err
	}
	left := time.Duration(before.Beat) + after - time.Duration(now)
	if before.Beat > 0 && before.Aside != asideForGood && left > 0 {
		p.aside, p.rests = true, time.Now().Add(left)
	}
	return nil
}

// attend has what comes to a socket kept, and tells the programs of it. The kernel takes it
// out again when it is closed.
func (p *presence) attend(family datapathFamily, c *net.UDPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var put error
	err = raw.Control(func(fd uintptr) {
		if put = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_BPF, p.keep.FD()); put == nil {
			put = p.listeners.Put(family, uint64(fd))
		}
	})
	if err != nil {
		return err
	}
	if put != nil {
		return fmt.Errorf("put a socket with %s into map %s, which takes Linux 5.15: %w", datapathProgDnsKeep, datapathMapListeners, put)
	}
	return nil
}

// beat tells them that the agent is there.
func (p *presence) beat() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.say()
}

// stepAside tells them whether the agent wants no more for now.
func (p *presence) stepAside(aside bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ending || p.aside == aside || !aside && time.Now().Before(p.rests) {
		return nil
	}
	p.aside = aside
	return p.say()
}

// end tells them that it wants no more at all.
func (p *presence) end() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.aside, p.ending = true, true
	return p.say()
}

// What struct presence has of an agent that is aside.
const asideForNow, asideForGood = 1, 2

// say writes what the programs are told; p.mu is held.
func (p *presence) say() error {
	now, err := sinceBoot()
	if err != nil {
		return err
	}
	is := datapathPresence{Beat: now}
	switch {
	case p.ending:
		is.Aside = asideForGood
	case p.aside:
		is.Aside = asideForNow
	}
	if err := p.presences.Put(uint32(0), is); err != nil {
		return fmt.Errorf("tell the nodedns programs that the agent is there: %w", err)
	}
	return nil
}

// sinceBoot is the clock of the programs, in nanoseconds: it goes on while the machine sleeps.
func sinceBoot() (uint64, error) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0, fmt.Errorf("read the time since boot: %w", err)
	}
	return uint64(now.Nano()), nil
}

func (p *presence) close() {
	for _, m := range []*ebpf.Map{p.presences, p.listeners, p.waiting} {
		if m != nil {
			m.Close()
		}
	}
	if p.keep != nil {
		p.keep.Close()
	}
}
