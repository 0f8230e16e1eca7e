package service

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/layer/layertest"
)

// withoutTCX lets the layer find what it finds before Linux 6.6.
func withoutTCX(t *testing.T) { layertest.WithoutTCX(t, &haveTCX) }

// filters lists the clsact filters at all devices of the node.
func (v *village) filters() (names []string) {
	v.t.Helper()
	v.must(v.Inside(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
				found, _ := netlink.FilterList(l, parent) // an error: no clsact qdisc
				for _, filter := range found {
					if bpf, ok := filter.(*netlink.BpfFilter); ok {
						names = append(names, l.Attrs().Name+" "+bpf.Name)
					}
				}
			}
		}
		return err
	}))
	return names
}

// strangeFilters is stranger() where there is no tcx.
func (v *village) strangeFilters(program *ebpf.Program) func() error {
	v.t.Helper()
	v.must(v.Inside(func() error {
		for i := range v.pods {
			device, err := netlink.LinkByName(fmt.Sprintf("veth%d", i+1))
			if err != nil {
				return err
			}
			if err := netlink.QdiscAdd(attach.Clsact(device.Attrs().Index)); err != nil && !errors.Is(err, unix.EEXIST) {
				return err
			}
			if err := v.strange(device, program); err != nil {
				return err
			}
		}
		return nil
	}))
	return func() error {
		left := 0
		for _, name := range v.filters() {
			if strings.HasSuffix(name, " stranger") {
				left++
			}
		}
		if left != v.pods {
			return fmt.Errorf("%d filters of a stranger are left, want %d", left, v.pods)
		}
		return nil
	}
}

// strange adds a filter of somebody else.
func (v *village) strange(device netlink.Link, program *ebpf.Program) error {
	return netlink.FilterAdd(&netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{LinkIndex: device.Attrs().Index,
		Parent: netlink.HANDLE_MIN_INGRESS, Protocol: unix.ETH_P_ALL, Priority: 7},
		Fd: program.FD(), Name: "stranger", DirectAction: true})
}

// Where there is no tcx, filters of clsact do the same: both directions, both
// families, taken over by the next process, gone when switched off, and those of
// others stay.
func TestPacketPathByFilters(t *testing.T) {
	withoutTCX(t)
	v, client, server := twoPods(t)
	v.must(v.Inside(func() error {
		veth, err := netlink.LinkByName(client.device)
		if err != nil {
			return err
		}
		return v.strange(veth, passing(t))
	}))
	if names := v.filters(); len(names) != 5 {
		t.Fatalf("filters at two devices: %v", names)
	}
	var conn net.Conn
	v.must(client.inside(func() (err error) {
		conn, err = net.Dial("tcp", "10.96.0.1:80")
		return err
	}))
	defer conn.Close()
	for i := range 3 {
		for _, way := range ways {
			if _, _, err := client.call(way.network, way.address, strings.Repeat("x", 3000)); err != nil {
				t.Errorf("%s to %s: %v", way.network, way.address, err)
			}
		}
		v.must(exchangeLine(conn, fmt.Sprint("with process ", i)))
		v.again(webAndNames(server))
		if names := v.filters(); len(names) != 5 {
			t.Fatalf("filters after process %d: %v", i, names)
		}
	}
	if description, err := v.layer.Describe(); err != nil || !strings.Contains(strings.Join(description.Degraded, " "), "Linux 6.6") {
		t.Errorf("what is missing is not said: %v, %v", description.Degraded, err)
	}
	v.must(v.layer.Close())
	_, err := New(v.layer.settings).Remove()
	v.must(err)
	if names := v.filters(); len(names) != 1 || names[0] != client.device+" stranger" {
		t.Errorf("removed, these are left: %v", names)
	}
	v.layer = New(v.layer.settings)
	v.must(v.layer.Open())
	v.have, err = v.layer.Read()
	v.must(err)
}
