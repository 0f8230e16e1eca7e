package pod

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/pod/pool"
)

// shortcuts is what the layer needs of its programs, which hand packets from pod to pod.
type shortcuts interface {
	// look says what is in force, and what of others has to be respected; devices are
	// those of pods.
	look(devices []int, ranges []netip.Prefix) (sights, error)
	// attach and detach are about the program at a pod's device.
	attach(device int, name string) error
	detach(device int) error
	// put says where an address is, forget that it is nowhere; it returns the device where
	// it was, or 0.
	put(netip.Addr, datapathHome) error
	forget(netip.Addr) (device int, err error)
	// open lets packets take shortcuts, or none.
	open(bool) error
	// restore pins what somebody unpinned.
	restore() error
	describe(*layer.Description) error
	close()
}

// sights are what there is of shortcuts.
type sights struct {
	// there says that there can be any.
	there bool
	open  bool
	// why is a sentence for the operator where others' rules need to see packets.
	why   string
	homes map[netip.Addr]datapathHome
	// attached are the devices with the program in force.
	attached map[int]bool
	// watched are those of which somebody looks at what they send, filtered those of which
	// somebody's filters look at what pods send.
	watched, filtered map[int]bool
	lost              []lost
}

// gate is whether shortcuts are open. It implements layer.Subject.
type gate struct{}

// Object implements layer.Subject.
func (gate) Object() string { return "shortcuts between pods" }

// Detail implements layer.Subject.
func (gate) Detail() string { return "" }

// shortcut is the way to a pod, and from it. It implements layer.Subject.
type shortcut struct {
	pod      *Pod
	homes    map[netip.Addr]datapathHome
	attached bool // the program is to be at its device
}

// Object implements layer.Subject.
func (s *shortcut) Object() string { return "shortcut to " + s.pod.Object() }

// Detail implements layer.Subject.
func (s *shortcut) Detail() string {
	for _, home := range s.homes {
		if home.Direct == 0 {
			return "at " + s.pod.Device + ", by the device, for somebody looks at what it sends"
		}
	}
	return "at " + s.pod.Device
}

// nowhere is an address of no pod to which a shortcut leads. It implements layer.Subject.
type nowhere netip.Addr

// Object implements layer.Subject.
func (n nowhere) Object() string { return "shortcut to " + netip.Addr(n).String() }

// Detail implements layer.Subject.
func (n nowhere) Detail() string { return "" }

// lost is something that was taken away. It implements layer.Subject.
type lost string

// Object implements layer.Subject.
func (l lost) Object() string { return string(l) }

// Detail implements layer.Subject.
func (l lost) Detail() string { return "" }

// shortcutOf is what a pod is to have. Where somebody's filters look at what it sends, its
// packets go by the stack; others' may still come to it by the device, as to one that
// receives at a limited rate.
func (s sights) shortcutOf(pod *Pod, mtu int) *shortcut {
	home := datapathHome{Device: uint32(pod.Index), Mtu: uint32(mtu)}
	copy(home.Ethernet[:6], podMAC(pod.Key))
	copy(home.Ethernet[6:], nodeMAC(pod.Key))
	if !s.watched[pod.Index] && pod.Bandwidth.IngressRate == 0 {
		home.Direct = 1
	}
	wanted := &shortcut{pod: pod, homes: map[netip.Addr]datapathHome{}, attached: !s.filtered[pod.Index]}
	for _, addr := range pod.Addresses {
		wanted.homes[addr] = home
	}
	return wanted
}

// wayTo is how packets of other pods come to one, by the words of enum crossing.
func (s sights) wayTo(pod *Pod) string {
	for _, addr := range pod.Addresses {
		switch home, there := s.homes[addr]; {
		case !s.open || !there || int(home.Device) != pod.Index:
			return "stack"
		case home.Direct == 0:
			return "device"
		}
	}
	return "direct"
}

// inForce says whether a shortcut is as it is to be.
func (s sights) inForce(wanted *shortcut) bool {
	for addr, home := range wanted.homes {
		if s.homes[addr] != home {
			return false
		}
	}
	return s.attached[wanted.pod.Index] == wanted.attached
}

// diffShortcuts says what leads to the shortcuts that pods are to have: closing comes
// first, opening last.
func diffShortcuts(have *Picture) (changes layer.Changes) {
	s := have.sights
	if !s.there {
		return nil
	}
	add := func(op layer.Op, subject layer.Subject) {
		changes = append(changes, layer.Change{Op: op, Subject: subject})
	}
	if s.open && s.why != "" {
		add(layer.Remove, gate{})
	}
	for _, what := range s.lost {
		add(layer.Add, what)
	}
	leads := map[netip.Addr]bool{}
	for _, pod := range have.pods {
		for _, addr := range pod.Addresses {
			leads[addr] = true
		}
		if pod.busy || pod.state == gone {
			continue
		}
		wanted := s.shortcutOf(pod, pod.mtu)
		switch {
		case s.inForce(wanted):
		case s.homes[pod.Addresses[0]] == datapathHome{}:
			add(layer.Add, wanted)
		default:
			add(layer.Alter, wanted)
		}
	}
	for _, addr := range slices.SortedFunc(maps.Keys(s.homes), netip.Addr.Compare) {
		if !leads[addr] {
			add(layer.Remove, nowhere(addr))
		}
	}
	if !s.open && s.why == "" {
		add(layer.Add, gate{})
	}
	return changes
}

// whyClosed says whose rules need to see packets between pods: those that need their
// connections tracked, as whoever translates addresses does. Empty where nobody's do.
func whyClosed(rules nft.Tracking, ranges []netip.Prefix) string {
	if use, found := rules.About(ranges); found {
		return fmt.Sprintf("packets between pods take no shortcuts: somebody's rules need to see them (%s)", use)
	}
	return ""
}

// setShortcut puts a pod's shortcut in force: what leads to it first, so that what it
// sends is answered the same way.
func (l *Layer) setShortcut(wanted *shortcut) error {
	lease, held := l.pool.Lease(wanted.pod.Key)
	if l.busy[wanted.pod.Key] || !held || !slices.Equal(lease.Addresses, wanted.pod.Addresses) {
		return nil // it ended meanwhile, or is about to
	}
	for addr, home := range wanted.homes {
		if err := l.shortcuts.put(addr, home); err != nil {
			return err
		}
	}
	if wanted.attached {
		return l.shortcuts.attach(wanted.pod.Index, wanted.pod.Device)
	}
	return l.shortcuts.detach(wanted.pod.Index)
}

// forget takes the shortcuts to an interface away, before its addresses can be another's.
func (l *Layer) forget(key pool.Key) error {
	lease, held := l.pool.Lease(key)
	if !held || l.shortcuts == nil {
		return nil
	}
	var failures []error
	for _, addr := range lease.Addresses {
		device, err := l.shortcuts.forget(addr)
		failures = append(failures, err, l.shortcuts.detach(device))
	}
	return errors.Join(failures...)
}

// Claim says that somebody is about to look at what a pod's device sends: from now on
// packets of other pods come by the device. It is for layers that attach programs there,
// to be called before.
func (l *Layer) Claim(device int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.shortcuts == nil {
		return nil
	}
	found, err := l.shortcuts.look(nil, nil)
	if err != nil {
		return err
	}
	for addr, home := range found.homes {
		if int(home.Device) != device || home.Direct == 0 {
			continue
		}
		home.Direct = 0
		if err := l.shortcuts.put(addr, home); err != nil {
			return fmt.Errorf("have packets of other pods come by device %d: %w", device, err)
		}
	}
	return nil
}

// addressOf is the kernel's form of an address: both families in 16 bytes.
func addressOf(addr netip.Addr) datapathAddress {
	return datapathAddress{Word: bpfmap.AddrWords(addr)}
}

func fromAddress(a datapathAddress) netip.Addr { return bpfmap.AddrOf(a.Word) }
