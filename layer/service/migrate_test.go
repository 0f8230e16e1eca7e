package service

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/model"
)

// otherwise is a C type as another version has it: with a field of its own in
// the middle of each structure of ours.
func otherwise(t btf.Type) btf.Type {
	switch t := btf.UnderlyingType(t).(type) {
	case *btf.Struct:
		if !slices.Contains([]string{"service", "backend", "flow", "sent_flows", "translation"}, t.Name) {
			return t
		}
		other := &btf.Struct{Name: t.Name}
		word := &btf.Int{Name: "unsigned int", Size: 4}
		add := func(name string, member btf.Type) {
			size, _ := btf.Sizeof(member)
			other.Members = append(other.Members, btf.Member{Name: name, Type: member, Offset: btf.Bits(8 * other.Size)})
			other.Size += uint32(size)
		}
		for i, m := range t.Members {
			if i == 1 {
				add("new_one", word)
				add("new_two", word)
			}
			for other.Size%uint32(min(4, max(1, size(m.Type)))) != 0 {
				other.Size++
			}
			add(m.Name, otherwise(m.Type))
		}
		other.Size = (other.Size + 7) &^ 7
		return other
	case *btf.Array:
		return &btf.Array{Index: t.Index, Type: otherwise(t.Type), Nelems: t.Nelems}
	default:
		return t
	}
}

func size(t btf.Type) int {
	size, _ := btf.Sizeof(t)
	return size
}

// leaveOtherwise makes the pins those that a process of another version left: the
// maps have other layouts, and the same in them. Programs are those of ours, over
// the maps that they had.
func (v *village) leaveOtherwise(names ...string) {
	v.t.Helper()
	spec, err := liveSpec()
	v.must(err)
	for _, name := range names {
		pin := filepath.Join(v.layer.settings.Pins, name)
		ours, err := ebpf.LoadPinnedMap(pin, nil)
		v.must(err)
		other := spec.Maps[name].Copy()
		other.MaxEntries, other.Value = ours.MaxEntries(), otherwise(other.Value)
		other.ValueSize = uint32(size(other.Value))
		if other.ValueSize == ours.ValueSize() && name != datapathMapPlaces && name != datapathMapSlots {
			v.t.Fatalf("%s is not laid out otherwise", name)
		}
		theirs, err := ebpf.NewMap(other)
		v.must(err)
		if other.Type == ebpf.SkStorage {
			v.must(carrySockets(name, ours, theirs))
		} else {
			v.must(carryMap(name, ours, theirs))
		}
		v.must(os.Remove(pin))
		v.must(theirs.Pin(pin))
		ours.Close()
		theirs.Close()
	}
	schema, err := ebpf.LoadPinnedMap(filepath.Join(v.layer.settings.Pins, datapathMapSchema), nil)
	v.must(err)
	defer schema.Close()
	for _, g := range groups {
		if slices.ContainsFunc(g.maps, func(name string) bool { return slices.Contains(names, name) }) {
			v.must(schema.Put(g.number, g.version+6))
		}
	}
}

// allLayouts are the maps that leaveOtherwise can lay out otherwise.
var allLayouts = []string{datapathMapServices, datapathMapSlots, datapathMapBackends, datapathMapConnected, datapathMapSent,
	datapathMapTranslations, datapathMapPlaces}

// bothPaths is webAndNames once for each path: the last byte of the Service's
// address is a hundred greater where packets are served.
func bothPaths(pods ...*pod) *model.Snapshot {
	all := webAndNames(pods...)
	for _, s := range slices.Clone(all.Services) {
		copied := *s
		copied.Name.Name += "-by-packet"
		copied.Annotations = map[string]string{PathAnnotation: string(PathPacket)}
		copied.ClusterIPs = nil
		for _, ip := range s.ClusterIPs {
			copied.ClusterIPs = append(copied.ClusterIPs, byPacket(ip))
		}
		all.Services = append(all.Services, &copied)
	}
	return all
}

func byPacket(ip netip.Addr) netip.Addr {
	bytes := ip.As16()
	bytes[15] += 100
	return netip.AddrFrom16(bytes).Unmap()
}

// conversation is an exchange that goes on and on over one socket, always with
// the same endpoint.
type conversation struct {
	what   string
	said   atomic.Int64
	socket net.PacketConn // unconnected, or nil
	conn   net.Conn
	to     net.Addr
	with   string
}

// converse says one thing and hears it again.
func (c *conversation) converse() error {
	text := fmt.Sprintf("%s %d", c.what, c.said.Load())
	if c.conn != nil {
		if _, stream := c.conn.(*net.TCPConn); stream {
			err := exchangeLine(c.conn, text)
			c.said.Add(1)
			return err
		}
	}
	buffer := make([]byte, 512)
	var n int
	var err error
	if c.conn != nil {
		c.conn.SetDeadline(time.Now().Add(patience))
		if _, err = c.conn.Write([]byte(text)); err == nil {
			n, err = c.conn.Read(buffer)
		}
	} else {
		c.socket.SetDeadline(time.Now().Add(patience))
		var from net.Addr
		if _, err = c.socket.WriteTo([]byte(text), c.to); err == nil {
			n, from, err = c.socket.ReadFrom(buffer)
		}
		if err == nil && from.String() != c.to.String() {
			err = fmt.Errorf("asked %v, and %v answers", c.to, from)
		}
	}
	if err != nil {
		return err
	}
	line, rest, _ := strings.Cut(string(buffer[:n]), "\n")
	if c.with == "" {
		c.with = line
	}
	if rest != text || line != c.with {
		return fmt.Errorf("said %q to %q, and heard %q from %q", text, c.with, rest, line)
	}
	c.said.Add(1)
	return nil
}

// talkAll opens a conversation in every way and keeps all going until the end of
// the test, when none may have failed.
func (v *village) talkAll(client *pod) []*conversation {
	v.t.Helper()
	var all []*conversation
	for _, way := range ways {
		to := netip.MustParseAddrPort(way.address)
		for _, ip := range []netip.Addr{to.Addr(), byPacket(to.Addr())} {
			address := netip.AddrPortFrom(ip, to.Port()).String()
			v.must(client.inside(func() error {
				conn, err := net.Dial(way.network, address)
				all = append(all, &conversation{what: way.network + " " + address, conn: conn})
				if err != nil || way.network == "tcp" {
					return err
				}
				socket, err := net.ListenPacket("udp", "")
				all = append(all, &conversation{what: "sendto " + address, socket: socket, to: net.UDPAddrFromAddrPort(netip.MustParseAddrPort(address))})
				return err
			}))
		}
	}
	var talking sync.WaitGroup
	var stop atomic.Bool
	for _, c := range all {
		v.must(c.converse())
		talking.Go(func() {
			for !stop.Load() {
				if err := c.converse(); err != nil {
					v.t.Errorf("%s, after %d exchanges: %v", c.what, c.said.Load(), err)
					return
				}
				time.Sleep(5 * time.Millisecond) // others need the processors, too
			}
		})
	}
	v.t.Cleanup(func() {
		stop.Store(true)
		talking.Wait()
		for _, c := range all {
			if c.conn != nil {
				c.conn.Close()
			} else {
				c.socket.Close()
			}
		}
	})
	return all
}

// seeTheService checks what getpeername() says of connected sockets.
func (v *village) seeTheService(all []*conversation) {
	v.t.Helper()
	for _, c := range all {
		if c.conn == nil {
			continue
		}
		raw, err := c.conn.(syscall.Conn).SyscallConn()
		v.must(err)
		v.must(raw.Control(func(fd uintptr) {
			peer, err := unix.Getpeername(int(fd))
			if err != nil || netip.AddrPortFrom(addressOfSocket(peer), uint16(port(peer))).String() != c.conn.RemoteAddr().String() {
				v.t.Errorf("%s: getpeername says %v, %v", c.what, peer, err)
			}
		}))
	}
}

func addressOfSocket(a unix.Sockaddr) netip.Addr {
	ip, _ := netip.AddrFromSlice(address(a))
	return ip.Unmap()
}

// goOn waits until each conversation has gone on by so many exchanges.
func (v *village) goOn(all []*conversation, by int64) {
	v.t.Helper()
	for _, c := range all {
		until := c.said.Load() + by
		for deadline := time.Now().Add(2 * patience); c.said.Load() < until; time.Sleep(time.Millisecond) {
			if v.t.Failed() || time.Now().After(deadline) {
				v.t.Fatalf("%s does not go on after %d exchanges", c.what, c.said.Load())
			}
		}
	}
}

// reopen is the next process.
func (v *village) reopen(snapshot *model.Snapshot) {
	v.t.Helper()
	v.layer.Close()
	v.must(v.layer.Open())
	var err error
	v.have, err = v.layer.Read()
	v.must(err)
	v.become(snapshot)
	description, err := v.layer.Describe()
	v.must(err)
	for _, text := range description.Degraded {
		if !strings.Contains(text, "Linux") {
			v.t.Errorf("degraded: %s", text)
		}
	}
	left, _ := filepath.Glob(filepath.Join(v.layer.settings.Pins, nextPrefix+"*"))
	if len(left) > 0 {
		v.t.Errorf("still beside: %v", left)
	}
}

// Another version had other layouts: what is open stays open, with the endpoint
// that it had, and new connections are made meanwhile and afterwards. That it
// goes between two programs that were really built is tested in cmd/millrace.
func TestAnotherVersionsFlowsGoOn(t *testing.T) {
	for _, row := range []struct {
		name    string
		filters bool // as before Linux 6.6
		other   []string
	}{
		{"all maps", false, allLayouts},
		{"all maps, by filters", true, allLayouts},
		{"tables", false, allLayouts[:3]},
		{"sockets", false, allLayouts[3:5]},
		{"flows", false, allLayouts[5:]},
	} {
		t.Run(row.name, func(t *testing.T) {
			if row.filters {
				withoutTCX(t)
			}
			v := newVillage(t, Settings{})
			client, first, second := v.pod(), v.pod(), v.pod()
			for i, p := range []*pod{first, second} {
				p.serve("tcp", 8080, fmt.Sprint("server", i))
				p.serve("udp", 5353, fmt.Sprint("server", i))
			}
			cluster := bothPaths(first, second)
			v.open(cluster)
			all := v.talkAll(client)
			for range 2 {
				v.layer.Close()
				v.leaveOtherwise(row.other...)
				v.goOn(all, 5)
				seen, err := New(v.layer.settings).Look()
				v.must(err)
				if left := v.layer.Diff(seen, v.layer.Plan(cluster), true); len(left) > 0 {
					t.Errorf("what another version has in force does not look like it: %v", left)
				}
				before, err := ebpf.LoadPinnedMap(filepath.Join(v.layer.settings.Pins, datapathMapHandover), nil)
				v.must(err)
				v.reopen(cluster)
				var begun uint32
				v.must(before.Lookup(uint32(0), &begun))
				if flows := row.name != "tables"; flows != (begun != 0) {
					t.Errorf("flows were carried over: %v; the old programs were told to begin none: %v", flows, begun != 0)
				}
				before.Close()
				v.seeTheService(all)
				v.goOn(all, 5)
				for _, way := range ways {
					if _, _, err := client.call(way.network, way.address, "new"); err != nil {
						t.Errorf("a new call of %s: %v", way.address, err)
					}
				}
			}
			v.reopen(cluster)
			v.goOn(all, 5)
			if counted, entries := v.flows(); counted*2 != entries {
				t.Errorf("%d flows are counted, and %d entries are there", counted, entries)
			}
		})
	}
}

// A process is killed at any step of taking over: the next one finishes it, or
// begins anew, and no flow notices.
func TestTakeOverThatIsCutShort(t *testing.T) {
	begun := func(d *datapath) error { return d.left[datapathMapHandover].Put(uint32(0), uint32(1)) }
	for _, row := range []struct {
		name    string
		begun   bool // the new programs begin flows
		filters bool // as before Linux 6.6
		steps   func(*datapath) error
	}{
		{"maps are pinned", false, false, func(d *datapath) error { _, err := d.pinBeside(d.maps); return err }},
		{"programs are attached", false, false, func(d *datapath) error { return attachAll(d, func(string) bool { return true }) }},
		{"some programs are attached", false, false, func(d *datapath) error {
			return attachAll(d, func(program string) bool { return program != datapathProgToPod })
		}},
		{"the old programs begin no flows any more", true, false, func(d *datapath) error {
			return errors.Join(attachAll(d, func(string) bool { return true }), begun(d))
		}},
		{"filters stand beside", false, true, func(d *datapath) error { return attachAll(d, func(string) bool { return true }) }},
		{"the old programs begin no flows any more, by filters", true, true, func(d *datapath) error {
			return errors.Join(attachAll(d, func(string) bool { return true }), begun(d))
		}},
		{"half of the programs are promoted", true, false, func(d *datapath) error {
			if err := errors.Join(attachAll(d, func(string) bool { return true }), begun(d)); err != nil {
				return err
			}
			from, to, err := d.openPairs()
			if err != nil {
				return err
			}
			carrier, err := newFlowCarrier(from, to)
			if err != nil {
				return err
			}
			if err := errors.Join(carrier.run(), carrySockets(datapathMapConnected, from[datapathMapConnected], to[datapathMapConnected]),
				carrySockets(datapathMapSent, from[datapathMapSent], to[datapathMapSent])); err != nil {
				return err
			}
			names, err := d.beside()
			for i, name := range names {
				if h := strings.TrimPrefix(name, nextPrefix); strings.HasPrefix(h, linkPrefix) && i%2 == 0 {
					err = errors.Join(err, attach.RemovePin(d.pin(h)), os.Rename(d.pin(name), d.pin(h)))
				}
			}
			return err
		}},
		{"half of the maps have their names", true, false, func(d *datapath) error {
			if err := errors.Join(attachAll(d, func(string) bool { return true }), begun(d)); err != nil {
				return err
			}
			before, err := d.beside()
			if err != nil {
				return err
			}
			kept := map[string]*ebpf.Map{}
			for _, name := range append(before, nextPrefix+datapathMapHandover) {
				m, err := ebpf.LoadPinnedMap(d.pin(strings.TrimPrefix(name, nextPrefix)), nil)
				if err == nil {
					kept[name] = m
				}
			}
			if err := d.finish(); err != nil {
				return err
			}
			return unfinish(d, kept, datapathMapHandover, datapathMapSchema, datapathMapTranslations)
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			if row.filters {
				withoutTCX(t)
			}
			v := newVillage(t, Settings{})
			client, server := v.pod(), v.pod()
			server.serve("tcp", 8080, "server")
			server.serve("udp", 5353, "server")
			cluster := bothPaths(server)
			v.open(cluster)
			all := v.talkAll(client)
			v.layer.Close()
			v.leaveOtherwise(allLayouts...)
			d := &datapath{settings: v.layer.settings, maps: map[string]*ebpf.Map{}, left: map[string]*ebpf.Map{}, ports: map[int]packetPort{}, attached: map[string]attach.Attachment{}}
			_, err := d.prepare()
			v.must(err)
			v.must(row.steps(d))
			d.close() // as the kernel does for one that was killed
			v.goOn(all, 5)
			for _, way := range ways {
				if _, _, err := client.call(way.network, way.address, "between"); err != nil {
					t.Errorf("a new call of %s while nobody finishes it: %v", way.address, err)
				}
			}
			if row.begun {
				all = append(all, v.talkAll(client)...) // with the new programs
			}
			v.reopen(cluster)
			v.goOn(all, 5)
			v.reopen(cluster)
			v.goOn(all, 5)
		})
	}
}

// attachAll pins and attaches what stands beside, as far as a program is wanted.
func attachAll(d *datapath, wanted func(program string) bool) error {
	if _, err := d.pinBeside(d.maps); err != nil {
		return err
	}
	attached := maps.Clone(d.attached)
	defer func() { d.attached = attached }()
	d.attached = maps.Clone(attached)
	for _, h := range d.hooks() {
		if !wanted(h.program) {
			delete(d.attached, h.name)
		}
	}
	return d.attachBeside(d.waiting)
}

// unfinish gives pins of maps the names back that they had before the end.
func unfinish(d *datapath, kept map[string]*ebpf.Map, names ...string) error {
	var failures []error
	for _, name := range names {
		failures = append(failures, os.Rename(d.pin(name), d.pin(nextPrefix+name)))
		if m := kept[nextPrefix+name]; m != nil {
			copied, err := m.Clone()
			failures = append(failures, err, copied.Pin(d.pin(name)))
		}
	}
	return errors.Join(failures...)
}

// What cannot be carried over is named, and new flows are served.
func TestFlowsThatCannotBeCarriedAreNamed(t *testing.T) {
	v, client, server := twoPods(t)
	cluster := webAndNames(server)
	v.layer.Close()
	v.leaveOtherwise(datapathMapTranslations)
	pin := filepath.Join(v.layer.settings.Pins, datapathMapTranslations)
	theirs, err := ebpf.LoadPinnedMap(pin, nil)
	v.must(err)
	nameless, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: theirs.KeySize(), ValueSize: theirs.ValueSize(), MaxEntries: theirs.MaxEntries(), Flags: theirs.Flags()})
	v.must(err)
	v.must(os.Remove(pin))
	v.must(nameless.Pin(pin))
	v.must(v.layer.Open())
	v.have, err = v.layer.Read()
	v.must(err)
	v.become(cluster)
	description, err := v.layer.Describe()
	v.must(err)
	if text := strings.Join(description.Degraded, "\n"); !strings.Contains(text, "flows of the packet path that were open before are broken") {
		t.Errorf("the status says only %q", text)
	}
	for _, way := range ways {
		if _, _, err := client.call(way.network, way.address, "new"); err != nil {
			t.Errorf("%s: %v", way.address, err)
			description, err := v.layer.Describe()
			t.Log(description.Reasons, err)
		}
	}
}

// The carrier copies each flow once, gives it a place, counts it, and adds what is
// seen of it later; of one that has begun anew it leaves the newer entry.
func TestFlowsAreCarriedOnce(t *testing.T) {
	v, client, _ := twoPods(t)
	all := []net.Conn{}
	v.must(client.inside(func() error {
		for _, way := range ways {
			conn, err := net.Dial(way.network, way.address)
			if err != nil {
				return err
			}
			t.Cleanup(func() { conn.Close() })
			all = append(all, conn)
			if err := exchangeLine(conn, "hello"); err != nil {
				return err
			}
		}
		return nil
	}))
	v.layer.Close()
	v.leaveOtherwise(datapathMapTranslations)
	from, to := map[string]*ebpf.Map{}, map[string]*ebpf.Map{}
	spec, err := liveSpec()
	v.must(err)
	sizeMaps(spec, capacity{1, 1}, 1024)
	for _, name := range flowMaps {
		from[name], err = ebpf.LoadPinnedMap(filepath.Join(v.layer.settings.Pins, name), nil)
		v.must(err)
		to[name], err = ebpf.NewMap(spec.Maps[name])
		v.must(err)
	}
	defer bpfmap.CloseAll(from)
	defer bpfmap.CloseAll(to)
	carrier, err := newFlowCarrier(from, to)
	v.must(err)
	for range 3 {
		v.must(carrier.run())
		v.held(to, len(all))
	}
	ended, anew := v.twoKeys(to)
	value, err := to[datapathMapTranslations].LookupBytes(anew)
	v.must(err)
	at := carrier.translations.to.value.find("to.destination.word[3]").at
	value[at]++ // another endpoint
	v.must(to[datapathMapTranslations].Put(anew, value))
	for _, key := range [][]byte{ended, anew} {
		old, err := from[datapathMapTranslations].LookupBytes(key)
		v.must(err)
		old[carrier.translations.from.value.find("flags").at] |= 1 // SEEN_FIN
		v.must(from[datapathMapTranslations].Put(key, old))
	}
	v.must(carrier.run())
	v.held(to, len(all))
	var got datapathTranslation
	v.must(to[datapathMapTranslations].Lookup(ended, &got))
	if got.Flags&1 == 0 {
		t.Error("what was seen of a flow after it was carried over is not noted")
	}
	now, err := to[datapathMapTranslations].LookupBytes(anew)
	if err != nil || string(now) != string(value) {
		t.Errorf("a flow that has begun anew is overwritten by its older entry: %v", err)
	}
}

// held checks that maps of flows hold so many flows, each with a place.
func (v *village) held(maps map[string]*ebpf.Map, flows int) {
	v.t.Helper()
	var entries, places int
	var key, none datapathTuple
	var place uint32
	all := maps[datapathMapPlaces].Iterate()
	for all.Next(&place, &key) {
		if key == none {
			continue
		}
		places++
		var value datapathTranslation
		v.must(maps[datapathMapTranslations].Lookup(key, &value))
		if value.Role != datapathRoleROLE_FROM_POD {
			v.t.Errorf("place %d holds a key of role %d", place, value.Role)
		}
	}
	v.must(all.Err())
	v.must(bpfmap.Walk(maps[datapathMapTranslations], func(_, _ []byte) error { entries++; return nil }))
	var usage datapathUsage
	v.must(maps[datapathMapFlowUsage].Lookup(uint32(0), &usage))
	if entries != 2*flows || places != flows || usage.Flows != int64(flows) {
		v.t.Errorf("%d entries, %d places, %d counted; want those of %d flows", entries, places, usage.Flows, flows)
	}
}

// twoKeys are the keys of two clients' entries.
func (v *village) twoKeys(maps map[string]*ebpf.Map) (one, other []byte) {
	v.t.Helper()
	none := make([]byte, maps[datapathMapPlaces].ValueSize())
	v.must(bpfmap.Walk(maps[datapathMapPlaces], func(_, key []byte) error {
		if string(key) != string(none) {
			one, other = other, bytes.Clone(key)
		}
		return nil
	}))
	return one, other
}

// A process whose source cannot be read takes everything over and takes nothing
// away.
func TestWithoutASourceNothingIsTakenAway(t *testing.T) {
	v := newVillage(t, Settings{})
	client, server := v.pod(), v.pod()
	server.serve("tcp", 8080, "server")
	server.serve("udp", 5353, "server")
	v.open(bothPaths(server))
	all := v.talkAll(client)
	attached := func() (programs []string) {
		description, err := v.layer.Describe()
		v.must(err)
		for _, p := range description.Programs {
			programs = append(programs, fmt.Sprint(p.Name, " ", p.Link))
		}
		return programs
	}
	before := attached()
	v.layer.Close()
	v.must(v.layer.Open())
	have, err := v.layer.Read()
	v.must(err)
	if changes := v.layer.Diff(have, v.layer.Plan(&model.Snapshot{}), false); len(changes) > 0 {
		t.Errorf("before anything was read from the source: %v", changes)
	}
	if now := attached(); v.layer.datapath.tcx && !slices.Equal(before, now) {
		t.Errorf("attached are %v, before %v", now, before)
	} else if len(now) != len(before) {
		t.Errorf("%d programs are attached, %d were before", len(now), len(before))
	}
	v.goOn(all, 5)
}
