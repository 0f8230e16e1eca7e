package dns

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	bpflink "github.com/cilium/ebpf/link"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/resolv"
	"github.com/millrace/millrace/layer"
)

// Explainer answers what would become of a pod's queries. It runs the program of this
// version over the pinned tables, which it opens for reading; all that the program writes to
// is its own, so that asking changes nothing. It has one user at a time.
type Explainer struct {
	settings Settings
	maps     map[string]*ebpf.Map
	program  *ebpf.Program
	// outside is the pinned map; the program sees copies of its entries, for it notes in
	// them when they were asked for.
	outside  *ebpf.Map
	outcomes []string
}

// askedMaps are what an answer depends on.
var askedMaps = []string{datapathMapNames, datapathMapResolvers, datapathMapAuthorities, datapathMapSearches}

// Pod is who asks.
type Pod struct {
	// Device is the index of its device at the node, 0 if it has none; Address its own.
	Device  int
	Address netip.Addr
	// Netns is the path of its network namespace.
	Netns string
	// Conf is its resolv.conf.
	Conf resolv.Conf
}

// OpenExplainer makes an Explainer for the layer that is in force at settings.Pins, for the
// zone settings.Zone. It wraps fs.ErrNotExist where the layer is off. It needs CAP_BPF,
// CAP_NET_ADMIN and CAP_PERFMON.
func OpenExplainer(settings Settings) (*Explainer, error) {
	const act = "explain names"
	if err := need.Check(act, "CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"); err != nil {
		return nil, err
	}
	x := &Explainer{settings: settings}
	if err := x.open(); err != nil {
		x.Close()
		return nil, fmt.Errorf("%s: %w", act, err)
	}
	return x, nil
}

func (x *Explainer) open() error {
	spec, err := loadDatapath()
	if err != nil {
		return fmt.Errorf("read embedded programs: %w", err)
	}
	if x.outcomes, err = outcomeNames(spec); err != nil {
		return err
	}
	if err := adapt(spec, x.settings); err != nil {
		return err
	}
	have := map[string]*ebpf.Map{}
	defer bpfmap.CloseAll(have) // the collection has copies
	for _, name := range append(slices.Clone(askedMaps), datapathMapOutside) {
		if have[name], err = x.pinned(spec.Maps[name], name); err != nil {
			delete(have, name)
			return err
		}
	}
	if x.outside, err = have[datapathMapOutside].Clone(); err != nil {
		return fmt.Errorf("open map %s: %w", datapathMapOutside, err)
	}
	have[datapathMapOutside].Close()
	delete(have, datapathMapOutside)
	if agents := x.agents(); agents != nil {
		have[datapathMapAgents] = agents
	}
	loaded, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: have})
	if err != nil {
		return loadError(err)
	}
	x.maps, x.program = loaded.Maps, loaded.Programs[datapathProgDnsFromPod]
	return nil
}

// pinned opens a map of the layer that is in force.
func (x *Explainer) pinned(spec *ebpf.MapSpec, name string) (*ebpf.Map, error) {
	path := filepath.Join(x.settings.Pins, name)
	m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return nil, fmt.Errorf("open pinned map %s: %w", path, err)
	}
	if m.KeySize() != spec.KeySize || m.ValueSize() != spec.ValueSize {
		m.Close()
		return nil, fmt.Errorf("read pinned map %s: its layout is another version's: ask the millrace that the agent runs", path)
	}
	spec.MaxEntries = m.MaxEntries()
	return m, nil
}

// agents is the map in which an agent's socket is while it takes queries, as the programs in
// force have it; nil where none is to be found, for it is not pinned.
func (x *Explainer) agents() *ebpf.Map {
	pins, err := filepath.Glob(filepath.Join(x.settings.Pins, layer.LinkPrefix+datapathProgDnsFromPod+"_*"))
	if err != nil {
		return nil
	}
	for _, pin := range pins {
		if agents := agentsOf(pin); agents != nil {
			return agents
		}
	}
	return nil
}

func agentsOf(pin string) *ebpf.Map {
	attached, err := bpflink.LoadPinnedLink(pin, nil)
	if err != nil {
		return nil
	}
	defer attached.Close()
	info, err := attached.Info()
	if err != nil {
		return nil
	}
	program, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		return nil
	}
	defer program.Close()
	of, err := program.Info()
	if err != nil {
		return nil
	}
	ids, _ := of.MapIDs()
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			return nil
		}
		if is, err := m.Info(); err == nil && is.Name == datapathMapAgents {
			return m
		}
		m.Close()
	}
	return nil
}

// Close frees the program and the maps.
func (x *Explainer) Close() error {
	bpfmap.CloseAll(x.maps)
	if x.program != nil {
		x.program.Close()
	}
	if x.outside != nil {
		x.outside.Close()
	}
	return nil
}

// Explain says what a pod's resolvers send for a name, and what becomes of it. Without an
// Explainer (nil) nothing is answered on the node. With really each query is sent from the
// pod's network namespace, some times, and what comes back is the answer.
func (x *Explainer) Explain(pod Pod, name string, really bool) ([]Lookup, error) {
	if len(pod.Conf.Servers) == 0 {
		return nil, errors.New("its resolv.conf names no server")
	}
	for _, resolver := range resolvers {
		for _, candidate := range candidates(resolver, pod.Conf, name) {
			if err := x.know(candidate); err != nil {
				return nil, err
			}
		}
	}
	said := map[[2]string]Sent{}
	ask := func(device int, really bool) asker {
		return func(name, kind string) (Sent, error) {
			if q, known := said[[2]string{name, kind}]; known && really {
				return q, nil
			}
			q := Sent{Name: name, Type: kind, By: ByServers}
			if questionOf(0, name, kind) == nil {
				q.Answer = &Answer{Code: codeAbsent, Addresses: []netip.Addr{}} // no resolver sends it
				return q, nil
			}
			if err := x.ask(&q, pod, device); err != nil {
				return q, err
			}
			if really {
				if err := q.send(pod); err != nil {
					return q, err
				}
				said[[2]string{name, kind}] = q
			}
			return q, nil
		}
	}
	return lookups(pod.Conf, name, ask(pod.Device, really), func(name, kind string) (Sent, error) {
		q, err := ask(0, false)(name, kind)
		if known, asked := said[[2]string{name, kind}]; asked && q.Answer == nil {
			q.Answer = known.Answer // of a server, which knows no search lists
		}
		return q, err
	})
}

// know copies what is known of a name to where the program looks.
func (x *Explainer) know(name string) error {
	if x == nil || !fits(strings.ToLower(name)) {
		return nil
	}
	key, entry := keyOf(strings.ToLower(name)), datapathOutsideName{}
	err := x.outside.Lookup(key, &entry)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	if err == nil {
		err = x.maps[datapathMapOutside].Put(key, &entry)
	}
	if err != nil {
		return fmt.Errorf("read map %s: %w", datapathMapOutside, err)
	}
	return nil
}

// skb is what the program sees of a packet beside its bytes: struct __sk_buff of
// linux/bpf.h, as far as a device's index.
type skb struct {
	_       [10]uint32
	Ifindex uint32
}

// ask gives the program a query, as if it came from the device.
func (x *Explainer) ask(q *Sent, pod Pod, device int) error {
	if x == nil {
		return nil
	}
	if err := x.tidy(); err != nil {
		return err
	}
	before, err := x.counts()
	if err != nil {
		return err
	}
	options := ebpf.RunOptions{Data: frameOf(pod.Address, pod.Conf.Servers[0], questionOf(1, q.Name, q.Type)), DataOut: make([]byte, 2048)}
	if device != 0 {
		options.Context = skb{Ifindex: uint32(device)}
	}
	err = netns.In(x.settings.Netns, func() error {
		_, err := x.program.Run(&options)
		return err
	})
	if err != nil {
		return fmt.Errorf("run %s: %w", datapathProgDnsFromPod, err)
	}
	after, err := x.counts()
	if err != nil {
		return err
	}
	for _, word := range x.outcomes {
		if after[word] > before[word] && (q.Outcome == "" || word == handed) {
			q.Outcome = word
		}
	}
	message := options.DataOut[min(len(options.DataOut), len(options.Data)-len(questionOf(1, q.Name, q.Type))):]
	switch {
	case q.Outcome == handed:
		q.By = ByAgent
	case len(message) > 2 && message[2]&0x80 != 0 && !bytes.Equal(options.Data, options.DataOut):
		q.By = ByKernel
		if q.Answer, err = answerIn(message); err != nil {
			return err
		}
		q.From = x.madeOf(q)
	}
	return nil
}

// tidy forgets queries that would have gone to the agent: one that waits is not taken twice.
func (x *Explainer) tidy() error {
	waiting := x.maps[datapathMapWaiting]
	var seat datapathSeat
	for waiting.NextKey(nil, &seat) == nil {
		if err := waiting.Delete(seat); err != nil {
			return fmt.Errorf("empty map %s: %w", datapathMapWaiting, err)
		}
	}
	return nil
}

// handed is the word of a query that goes to the agent.
const handed = "handed"

func (x *Explainer) counts() (map[string]uint64, error) {
	return bpfmap.Counts(x.maps[datapathMapOutcomes], x.outcomes)
}

// madeOf says what an answer of the kernel is made of.
func (x *Explainer) madeOf(q *Sent) string {
	name := strings.ToLower(q.Name)
	if q.Answer.Alias != "" {
		name = strings.ToLower(q.Answer.Alias)
	}
	below, inside := strings.CutSuffix(name, "."+x.settings.Zone)
	labels := strings.Split(below, ".")
	switch n := len(labels); {
	case !inside:
		return "what was learned of " + name
	case q.Answer.Code == codeAbsent:
		return "the cluster has no such name"
	case n >= 3 && labels[n-1] == "svc":
		return fmt.Sprintf("Service %s/%s", labels[n-2], labels[n-3])
	}
	return "the cluster's names"
}

// frameOf is a UDP datagram to port 53 as it comes from a pod, without a checksum.
func frameOf(from, to netip.Addr, message []byte) []byte {
	if from.Is4() != to.Is4() {
		from = netip.IPv6LinkLocalAllNodes() // any: the pod has one of each family, and it does not matter
		if to.Is4() {
			from = netip.AddrFrom4([4]byte{169, 254, 0, 1})
		}
	}
	length := udpLength + len(message)
	frame := make([]byte, 12, ethernetLength+ip6Length+length)
	if to.Is4() {
		frame = append(frame, 8, 0, 0x45, 0)
		frame = binary.BigEndian.AppendUint16(frame, uint16(ip4Length+length))
		frame = append(frame, 0, 0, 0, 0, 64, 17, 0, 0)
	} else {
		frame = append(frame, 0x86, 0xdd, 0x60, 0, 0, 0)
		frame = binary.BigEndian.AppendUint16(frame, uint16(length))
		frame = append(frame, 17, 64)
	}
	frame = append(append(frame, from.AsSlice()...), to.AsSlice()...)
	frame = append(frame, 0x80, 0, 0, 53)
	frame = binary.BigEndian.AppendUint16(frame, uint16(length))
	return append(append(frame, 0, 0), message...)
}

const (
	// sendTimes is how often a query is really sent; the first is not counted, for the next
	// may find what it brought.
	sendTimes = 6
	// sendWait is how long an answer may take, as in resolv.conf(5).
	sendWait = 5 * time.Second
)

// send really sends a query from the pod, and notes what came back and how fast.
func (q *Sent) send(pod Pod) error {
	var conn net.Conn
	err := netns.In(pod.Netns, func() (err error) {
		conn, err = net.Dial("udp", netip.AddrPortFrom(pod.Conf.Servers[0], 53).String())
		return err
	})
	if err != nil {
		return fmt.Errorf("ask %s: %w", pod.Conf.Servers[0], err)
	}
	defer conn.Close()
	var times []time.Duration
	answer := make([]byte, 1500)
	for i := range sendTimes {
		query := questionOf(uint16(time.Now().UnixNano())+uint16(i), q.Name, q.Type)
		begun := time.Now()
		_ = conn.SetDeadline(begun.Add(sendWait))
		if _, err := conn.Write(query); err != nil {
			return fmt.Errorf("ask %s: %w", pod.Conf.Servers[0], err)
		}
		n, err := readAnswer(conn, query, answer)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			q.Answer = &Answer{Code: "no answer within " + sendWait.String(), Addresses: []netip.Addr{}}
			return nil
		}
		if err != nil {
			return fmt.Errorf("ask %s: %w", pod.Conf.Servers[0], err)
		}
		times = append(times, time.Since(begun))
		if q.Answer, err = answerIn(answer[:n]); err != nil {
			return err
		}
	}
	times = times[1:]
	slices.Sort(times)
	q.Took = times[len(times)/2]
	return nil
}

// readAnswer passes over what is no answer to the query.
func readAnswer(conn net.Conn, query, answer []byte) (int, error) {
	for {
		n, err := conn.Read(answer)
		if err != nil || n >= headerLength && bytes.Equal(answer[:2], query[:2]) {
			return n, err
		}
	}
}

// IsOff says that an error of OpenExplainer means that the layer is off.
func IsOff(err error) bool { return errors.Is(err, fs.ErrNotExist) }
