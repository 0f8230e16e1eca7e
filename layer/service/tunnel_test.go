package service

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/millrace/millrace/kernel/netns"
)

// tunnel leads from the node to a machine's eth0, by devices whose packets have no
// Ethernet headers, as WireGuard's and IPIP's: a tun at each end, and this process
// between them.
func (h *harbour) tunnel(p *pod) int {
	h.t.Helper()
	here, index := h.tun("", p.device)
	there, _ := h.tun(p.netns, "eth0")
	go forward(here, there)
	go forward(there, here)
	return index
}

// forward forwards packets until from is closed. A device that is not up takes none.
func forward(from, to *os.File) {
	packet := make([]byte, 65536)
	for {
		n, err := from.Read(packet)
		if err != nil {
			return
		}
		to.Write(packet[:n])
	}
}

// tun makes a device in a namespace, the node's if path is empty.
func (h *harbour) tun(path, name string) (file *os.File, index int) {
	h.t.Helper()
	made := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TUN,
		Flags: netlink.TUNTAP_NO_PI, Queues: 1, NonPersist: true}
	make := func() error {
		if err := netlink.LinkAdd(made); err != nil {
			return err
		}
		l, err := netlink.LinkByName(name)
		if err == nil {
			index = l.Attrs().Index
		}
		return err
	}
	if path == "" {
		h.must(h.Inside(make))
	} else {
		h.must(netns.Do(path, make))
	}
	h.t.Cleanup(func() { made.Fds[0].Close() })
	return made.Fds[0], index
}

// Nodes that reach each other and their clients by WireGuard or IPIP, as with Calico or
// Tailscale: every entry works from behind such a device, to a pod of this node and to
// one behind another such device, which sees the node's address there; and what has no
// endpoint is refused at once.
func TestWiresWithoutEthernetHeaders(t *testing.T) {
	t.Run("tcx", wiresWithoutEthernetHeaders)
	t.Run("filters", func(t *testing.T) {
		withoutTCX(t)
		wiresWithoutEthernetHeaders(t)
	})
}

func wiresWithoutEthernetHeaders(t *testing.T) {
	h := harbourBy(t, (*harbour).tunnel)
	h.routes(h.client.netns, "192.0.3.0/24", nodeToClient)
	h.local.serveAll("local")
	h.other.serveAll("far")
	h.open(h.services(nil, h.local))
	for _, row := range []struct {
		server       *pod
		name         string
		sees4, sees6 string
	}{{h.local, "local", client4, client6}, {h.other, "far", nodeToOther, nodeToOther6}} {
		h.become(h.services(nil, row.server))
		h.again(h.services(nil, row.server)) // another process takes it over
		h.reaches(row.name, row.sees4, row.sees6, 1<<16)
	}
	h.become(h.services(nil))
	for _, way := range entrances[:4] {
		begun := time.Now()
		if _, _, err := h.client.call(way.network, way.address, "x"); err == nil || !strings.Contains(err.Error(), "refused") || time.Since(begun) > time.Second {
			t.Errorf("%s to %s without endpoints: %v after %v, want a refusal", way.network, way.address, err, time.Since(begun))
		}
	}
}
