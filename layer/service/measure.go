package service

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/model"
)

// Shot is one way to run a program of the packet path on one packet.
type Shot struct {
	Name string
	// About says what the packet is.
	About string
	// Fire runs the program once, on a packet of its own, and returns the time
	// that the kernel measured around it.
	Fire func() (time.Duration, error)
}

// Range is a place to measure the programs of the packet path, one packet at a
// time, by BPF_PROG_TEST_RUN: its tables hold Services, its programs are attached
// nowhere. It needs CAP_BPF and CAP_NET_ADMIN.
type Range struct {
	collection *ebpf.Collection
	services   []netip.AddrPort
	random     *rand.Rand
	port       uint16
}

// OpenRange fills tables with the Services, as the layer does for a Snapshot, and
// opens one flow to each that has a TCP port.
func OpenRange(services []*model.Service) (*Range, error) {
	r := &Range{random: rand.New(rand.NewPCG(1, 2)), port: 1024}
	if err := r.load((&planner{}).plan(Settings{}, &model.Snapshot{Services: services}).index()); err != nil {
		r.Close()
		return nil, fmt.Errorf("measure the packet path: %w", err)
	}
	return r, nil
}

func (r *Range) load(rows map[Frontend]*Row) error {
	spec, err := loadDatapath()
	if err != nil {
		return err
	}
	for name, program := range spec.Programs {
		if program.Type != ebpf.SchedCLS {
			delete(spec.Programs, name)
		}
	}
	for _, row := range rows {
		if row.Protocol == model.TCP && row.Address.Addr().Is4() {
			r.services = append(r.services, row.Address)
		}
	}
	if len(r.services) == 0 {
		return errors.New("no Service has a TCP port over IPv4")
	}
	changes, backends := additions(rows)
	room, places := roomFor(len(rows), backends), flowPlaces(0)
	sizeMaps(spec, room, places)
	if err := spec.Variables["places_mask"].Set(uint32(places - 1)); err != nil {
		return err
	}
	if r.collection, err = ebpf.NewCollection(spec); err != nil {
		return loadError(err)
	}
	t := &tables{entries: map[Frontend]*entry{}}
	t.use(r.collection.Maps)
	if err := errors.Join(t.apply(changes)...); err != nil {
		return err
	}
	for _, to := range r.services {
		if _, err := r.fire(datapathProgFromPod, r.frame(to, knownPort, tcpSYN), forwarded); err != nil {
			return err
		}
	}
	return nil
}

// Close frees programs and maps.
func (r *Range) Close() error {
	if r.collection != nil {
		r.collection.Close()
	}
	return nil
}

// The packets of a range: from one client, of established flows from one port.
var rangeClient = netip.AddrFrom4([4]byte{10, 244, 255, 250})

const (
	knownPort = 1000
	tcpSYN    = 0x02
	tcpACK    = 0x10
)

// Shots are the ways to run the programs: the first is what all others are to be
// taken from.
func (r *Range) Shots() []Shot {
	some := func() netip.AddrPort { return r.services[r.random.IntN(len(r.services))] }
	one := r.services[0]
	stranger := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 1}), 80)
	shot := func(name, about, program string, to func() netip.AddrPort, port func() uint16, flags byte, want uint32) Shot {
		return Shot{name, about, func() (time.Duration, error) {
			return r.fire(program, r.frame(to(), port(), flags), want)
		}}
	}
	fixed := func(to netip.AddrPort) func() netip.AddrPort { return func() netip.AddrPort { return to } }
	known := func() uint16 { return knownPort }
	fresh := func() uint16 {
		if r.port++; r.port == 0 {
			r.port = 1024
		}
		return r.port
	}
	return []Shot{
		shot("empty", "a program that does nothing", datapathProgNothing, some, known, tcpACK, forwarded),
		shot("one look-up", "the address in one hash map of all Services", datapathProgOneLookUp, some, known, tcpACK, found),
		shot("not a Service", "a packet of a connection to an address that is nobody's", datapathProgFromPod, fixed(stranger), known, tcpACK, forwarded),
		shot("not a Service, SYN", "the first packet of such a connection", datapathProgFromPod, fixed(stranger), known, tcpSYN, forwarded),
		shot("established", "a packet of a translated connection, each time of another", datapathProgFromPod, some, known, tcpACK, forwarded),
		shot("established, again", "the next packet of the same connection", datapathProgFromPod, fixed(one), known, tcpACK, forwarded),
		shot("new", "the first packet of a connection, each time to another Service", datapathProgFromPod, some, fresh, tcpSYN, forwarded),
		shot("new, again", "the first packet of another connection to the same Service", datapathProgFromPod, fixed(one), fresh, tcpSYN, forwarded),
	}
}

// What the programs answer: TC_ACT_UNSPEC, TC_ACT_OK.
const (
	forwarded = 0xffffffff
	found     = 0
)

func (r *Range) frame(to netip.AddrPort, port uint16, flags byte) []byte {
	frame, err := frameOf(Question{model.TCP, netip.AddrPortFrom(rangeClient, port), to})
	if err != nil {
		return nil // fire says that it cannot be run
	}
	frame[14+20+13] = flags
	return frame
}

func (r *Range) fire(program string, frame []byte, want uint32) (time.Duration, error) {
	answer, took, err := r.collection.Programs[program].Benchmark(frame, 1, nil)
	if err != nil {
		return 0, fmt.Errorf("run %s: %w", program, err)
	}
	if answer != want {
		return 0, fmt.Errorf("run %s: it answers %d, not %d", program, int32(answer), int32(want))
	}
	return took, nil
}
