package route

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"

	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/model"
)

var update = flag.Bool("update", false, "write the golden files")

// TestWays tells the story in testdata/ways.txtar; ways.golden has the changes, and why
// there is no way to a node.
func TestWays(t *testing.T) {
	story, err := txtar.ParseFile(filepath.Join("testdata", "ways.txtar"))
	must(t, err)
	var text strings.Builder
	have := newPicture()
	for _, step := range story.Files {
		settings := Settings{Node: "n1"}
		var snapshot *model.Snapshot
		snapshot, have.facts = clusterOf(t, &settings, string(step.Data))
		have.ports = slices.DeleteFunc(have.ports, func(p port) bool { return !p.attached })
		for index, device := range have.facts.devices {
			have.ports = addPort(have.ports, port{Index: index, Name: device.name})
		}
		have.ports = addPort(have.ports, port{Index: 50, Name: "veth0", ofPod: true, pod: true})
		slices.SortFunc(have.ports, func(a, b port) int { return a.Index - b.Index })
		want := plan(settings, snapshot)
		changes := diff(settings, have, want, snapshot.Complete)
		text.WriteString("# " + step.Name + "\n")
		must(t, changes.Print(&text))
		if want.wish != nil {
			aim := resolve(settings, want.wish, have.facts)
			for _, why := range slices.Concat(aim.left, aim.narrow) {
				text.WriteString("! " + why + "\n")
			}
			if why := resolve(settings, want.wish, have.facts).why; why != "" {
				text.WriteString("! " + why + "\n")
			}
		}
		for _, change := range changes {
			have.note(change)
		}
		if left := diff(settings, have, want, snapshot.Complete); len(left) > 0 {
			t.Errorf("%s: applied, and still to do:\n%v", step.Name, left)
		}
	}
	golden := filepath.Join("testdata", "ways.golden")
	if *update {
		must(t, os.WriteFile(golden, []byte(text.String()), 0o644))
	}
	want, err := os.ReadFile(golden)
	if err != nil || string(want) != text.String() {
		t.Errorf("the ways are\n%s\nand %s has\n%s%v", text.String(), golden, want, err)
	}
}

func addPort(ports []port, p port) []port {
	if slices.ContainsFunc(ports, func(there port) bool { return there.Index == p.Index && there.ofPod == p.ofPod }) {
		return ports
	}
	return append(ports, p)
}

// clusterOf reads the lines of a cluster and of a host.
func clusterOf(t *testing.T, settings *Settings, text string) (*model.Snapshot, facts) {
	t.Helper()
	s, f := &model.Snapshot{Complete: true}, facts{devices: map[int]fact{}, paths: map[netip.Addr]measurement{}, shortcuts: true}
	index := map[string]int{}
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		switch words[0] {
		case "incomplete":
			s.Complete = false
		case "old":
			f.shortcuts = false
		case "rule":
			f.rules = nft.Tracking{Asked: true, Uses: []nft.Use{{Family: "ip", Table: "nat", Chain: "services", What: "translates destinations", To: netip.MustParsePrefix(words[1])}}}
		case "vxlan":
			settings.Mode = ModeVXLAN
		case "device":
			mtu, err := strconv.Atoi(words[2])
			must(t, err)
			number := 2
			if words[1] != "eth0" {
				number = 3
			}
			index[words[1]] = number
			f.devices[number] = fact{name: words[1], mtu: mtu, ethernet: len(words) == 3}
		case "route":
			h := hop{device: index[words[2]]}
			if at := slices.Index(words, "mtu"); at > 0 {
				mtu, err := strconv.Atoi(words[at+1])
				must(t, err)
				h.mtu, words = mtu, words[:at]
			}
			if len(words) > 3 {
				h.via = netip.MustParseAddr(words[4])
			}
			h.to = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
			if words[1] != "default" {
				h.to = netip.MustParsePrefix(words[1])
			}
			f.hops = append(f.hops, h)
		case "net-conf": // PORT [straight | NETWORK]
			s.Flannel = &model.FlannelNetwork{DirectRouting: words[len(words)-1] == "straight"}
			_, err := fmt.Sscan(words[1], &s.Flannel.Port)
			must(t, err)
			if len(words) > 2 && !s.Flannel.DirectRouting {
				_, err = fmt.Sscan(words[2], &s.Flannel.VNI)
				must(t, err)
			}
		case "flannels":
			f.flannels, f.inUse = words[1:], true
		case "passes": // ADDRESS BYTES of BYTES [said by ROUTER]
			var m measurement
			_, err := fmt.Sscan(words[2]+" "+words[4], &m.Passed, &m.Tried)
			must(t, err)
			if len(words) > 5 {
				m.Announced, m.By = m.Passed, netip.MustParseAddr(words[7])
			}
			f.paths[netip.MustParseAddr(words[1])] = m
		case "fabric": // RANGE over, or RANGE kept
			if f.fabrics == nil {
				f.fabrics = map[netip.Prefix]course{}
			}
			f.fabrics[netip.MustParsePrefix(words[1])] = course{over: words[2] == "over", kept: true}
		case "node":
			n := &model.Node{Name: words[1]}
			for _, word := range words[2:] {
				if word == "gone" {
					n.Labels = map[string]string{FlannelLabel: FlannelGone}
					continue
				}
				if said, ok := flannelOf(word); ok {
					n.Flannel = said
					continue
				}
				if p, err := netip.ParsePrefix(word); err == nil {
					n.PodCIDRs = append(n.PodCIDRs, p)
					continue
				}
				n.Addresses = append(n.Addresses, netip.MustParseAddr(word))
			}
			s.Nodes = append(s.Nodes, n)
		default:
			t.Fatalf("%q is not understood", line)
		}
	}
	return s, f
}

// flannelOf reads what a Node says to flannel's nodes: "flannel:vxlan,1,12c66589b4e3,192.0.2.2",
// or from an agent for them "millrace:..." with the port at the end.
func flannelOf(word string) (*model.Flannel, bool) {
	by, said, _ := strings.Cut(word, ":")
	f := &model.Flannel{Millrace: by == "millrace"}
	if by != "flannel" && !f.Millrace {
		return nil, false
	}
	fields := strings.Split(said, ",")
	f.Backend = fields[0]
	fields[0] = ""
	var mac []byte
	_, _ = fmt.Sscanf(strings.Join(fields, " "), "%d %x", &f.VNI, &mac)
	copy(f.MAC[:], mac)
	for _, field := range fields[min(3, len(fields)):] {
		if port, err := strconv.Atoi(field); err == nil {
			f.Port = uint16(port)
		} else if a := netip.MustParseAddr(field); a.Is4() {
			f.Address = a
		} else {
			f.Address6, f.MAC6 = a, f.MAC
		}
	}
	return f, true
}

// Whatever has been written can be read back.
func TestEntries(t *testing.T) {
	d := &device{MAC: [6]byte{2, 1, 2, 3, 4, 5}}
	for _, row := range []*Row{
		{To: netip.MustParsePrefix("10.244.2.0/24"), Via: netip.MustParseAddr("192.0.2.2"), Local: netip.MustParseAddr("192.0.2.1"), index: 7, MTU: 1450, MAC: [6]byte{2, 9}, Near: true},
		{To: netip.MustParsePrefix("fd00:244:2::/64"), Via: netip.MustParseAddr("2001:db8::2"), Local: netip.MustParseAddr("2001:db8::1"), index: 8, MTU: 8930},
		{To: netip.MustParsePrefix("10.0.0.0/8"), Via: netip.MustParseAddr("2001:db8::2"), Local: netip.MustParseAddr("2001:db8::1"), index: 8, MTU: 1430},
		{To: netip.MustParsePrefix("10.244.2.7/32"), Via: netip.MustParseAddr("192.0.2.2"), Local: netip.MustParseAddr("192.0.2.1"), index: 7, MTU: 1450},
		{To: netip.MustParsePrefix("fd00:244:3::/64"), Direct: true, Shortcut: true, Via: netip.MustParseAddr("2001:db8::2"), index: 8, MTU: 1500},
	} {
		back := rowOf(rangeOf(row.To), entryOf(row, d))
		if !back.equal(row) || back.ownMAC != d.MAC {
			t.Errorf("%s was read back as %s", fmt.Sprint(row), fmt.Sprint(back))
		}
	}
}

// Hardware addresses are locally administered, no groups, and differ.
func TestHardwareAddresses(t *testing.T) {
	seen := map[[6]byte]string{}
	for i := range 2000 {
		for _, text := range []string{fmt.Sprintf("192.0.%d.%d", i>>8, i&255), fmt.Sprintf("2001:db8::%x", i)} {
			mac := macOf([]netip.Addr{netip.MustParseAddr(text)})
			if mac[0]&3 != 2 || seen[mac] != "" {
				t.Errorf("%s has %x, as has %q", text, mac, seen[mac])
			}
			seen[mac] = text
		}
	}
}
