package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// Names as millrace answers for them, the kernel and the agent, beside names as CoreDNS
// does, of the same objects in one API server: the queries that are made up in names_query_test.go, about what is
// written in names_objects_test.go.
//
//	pod --query--> 10.96.0.10 (millrace; what neither kernel nor agent answers is refused)
//	           \-> CoreDNS, by itself
const (
	// queriesInCI and queriesLong are how many are asked, over all rounds.
	queriesInCI = 100_000
	queriesLong = 1_000_000
	// rounds are how often the objects are altered between.
	rounds = 4
	// mostPassedUp is how many of the queries that are to be answered here may be passed
	// up: where the agent has not been heard of for two seconds, on a busy machine.
	mostPassedUp = 0.001

	oracleAddress = "127.0.0.1:5301"
	serverV4      = "10.244.0.53"
	serverV6      = "fd00:10:244::53"
)

// namesCorefile: the first server is asked by the test, the second is the DNS Service's
// endpoint, which refuses what is passed up. TTL is more than an SOA record may have.
const namesCorefile = `cluster.local:5301 in-addr.arpa:5301 ip6.arpa:5301 {
    kubernetes cluster.local in-addr.arpa ip6.arpa {
        kubeconfig %s
        pods insecure
        ttl 600
    }
}
.:5300 {
    template ANY ANY . {
        rcode REFUSED
    }
}
`

// namesBed is an API server, CoreDNS, and a node with a pod.
type namesBed struct {
	*apiBed
	pod    string // its network namespace
	run    string
	client *http.Client
	log    string
}

// What kernel and agent answer is what CoreDNS answers, but for the differences that
// docs/dns.md lists.
func TestNamesAreThoseOfCoreDNS(t *testing.T) {
	count := queriesInCI
	if os.Getenv("MILLRACE_LONG") != "" {
		count = queriesLong
	}
	b := newNamesBed(t)
	town := newTown(rand.New(rand.NewPCG(1, 2)))
	b.writes(town.write(0))
	b.startCoreDNS()
	b.startAgent()
	listed := listedDifferences(t)
	sum := &tally{listed: listed, differences: map[string]int{}, passed: map[string]int{}, answered: map[string]int{}}
	begun := time.Now()
	for round := range rounds {
		if round > 0 {
			b.writes(town.write(round))
		}
		b.settled(town.sentinel(round))
		b.ask(town, uint64(round), count/rounds, sum)
		if t.Failed() {
			break
		}
	}
	sum.tell(t, time.Since(begun))
	b.tellReasons(sum.oursToAnswer)
}

// tellReasons says what became of the queries by the kernel's own count, and judges how
// many it answered itself.
func (b *namesBed) tellReasons(ours int) {
	b.t.Helper()
	text, err := exec.Command(b.millrace, "status", "--run", b.run, "-o", "json").Output()
	if len(text) == 0 {
		b.t.Fatal(err)
	}
	var status struct{ Layers []namesLayer }
	decode(b.t, text, &status)
	for _, l := range status.Layers {
		if l.Name != "dns" {
			continue
		}
		answered := l.Reasons["answered"] + l.Reasons["nodata"] + l.Reasons["nxdomain"]
		b.t.Logf("the kernel answered %d: %v", answered, l.Reasons)
		if float64(answered) < float64(ours)*(1-mostPassedUp) {
			b.t.Errorf("the kernel answered %d of %d queries that are its own to answer", answered, ours)
		}
		return
	}
	b.t.Errorf("status has no layer dns: %s", text)
}

func newNamesBed(t *testing.T) *namesBed {
	b := &namesBed{apiBed: newAPIBedFor(t, serviceV4+","+serviceV6, "coredns")}
	b.run, b.log = filepath.Join(b.folder, "run"), filepath.Join(b.folder, "agent.log")
	b.client = &http.Client{Transport: &http.Transport{
		DialContext: func(_ context.Context, network, address string) (net.Conn, error) {
			return dialIn("/run/netns/"+b.space, network, address)
		},
		TLSClientConfig: insecure, MaxIdleConnsPerHost: 16,
	}}
	b.pod = b.space + "-pod"
	b.must(exec.Command("ip", "netns", "add", b.pod))
	t.Cleanup(func() { exec.Command("ip", "netns", "delete", b.pod).Run() })
	b.must(b.inside("sh", "-ec", `
		ip addr add `+serverV4+`/32 dev lo; ip addr add `+serverV6+`/128 dev lo nodad
		ip link add pod1 address 02:00:00:00:00:01 type veth peer name eth0 address 02:00:00:00:00:02 netns `+b.pod+`
		ip link set pod1 up; ip route add 10.244.0.7/32 dev pod1; ip -6 route add fd00:10:244::7/128 dev pod1
		ip neigh add 10.244.0.7 lladdr 02:00:00:00:00:02 dev pod1; ip neigh add fd00:10:244::7 lladdr 02:00:00:00:00:02 dev pod1`))
	b.must(exec.Command("ip", "netns", "exec", b.pod, "sh", "-ec", `
		ip link set lo up; ip link set eth0 up; ip addr add 10.244.0.7/32 dev eth0; ip addr add fd00:10:244::7/128 dev eth0 nodad
		ip neigh add 169.254.1.1 lladdr 02:00:00:00:00:01 dev eth0; ip route add 169.254.1.1/32 dev eth0; ip route add default via 169.254.1.1
		ip neigh add fe80::1 lladdr 02:00:00:00:00:01 dev eth0; ip -6 route add default via fe80::1 dev eth0`))
	return b
}

// dialIn connects a socket of another network namespace.
func dialIn(space, network, address string) (c net.Conn, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The process' first thread cannot end, and says whose namespace the process is
			// in: whoever ends those of the cluster would end this one.
			c, err = dialIn(space, network, address)
			runtime.UnlockOSThread()
			return
		}
		// Never unlocked: the thread ends with the goroutine.
		file, opened := os.Open(space)
		if err = opened; err != nil {
			return
		}
		defer file.Close()
		if err = unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err == nil {
			c, err = net.Dial(network, address)
		}
	}()
	<-done
	return c, err
}

// call sends an object to the API server; nil is none.
func (b *namesBed) call(method, path string, o object) (int, string, error) {
	body, err := json.Marshal(o)
	if err != nil {
		return 0, "", err
	}
	request, err := http.NewRequest(method, "https://127.0.0.1:6443"+path, bytes.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	request.Header.Set("Authorization", "Bearer admin-token")
	request.Header.Set("Content-Type", "application/json")
	response, err := b.client.Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	var text bytes.Buffer
	_, err = text.ReadFrom(response.Body)
	return response.StatusCode, text.String(), err
}

// writes carries out what a town wants written, in order by phase, some at once.
func (b *namesBed) writes(phases [][]written) {
	b.t.Helper()
	for _, phase := range phases {
		var writers sync.WaitGroup
		next := make(chan written)
		for range 8 {
			writers.Go(func() {
				for w := range next {
					if status, text, err := b.call(w.method, w.path, w.object); err != nil || status >= 300 {
						b.t.Errorf("%s %s: %d %.300s %v", w.method, w.path, status, text, err)
					}
				}
			})
		}
		for _, w := range phase {
			next <- w
		}
		close(next)
		writers.Wait()
	}
	if b.t.Failed() {
		b.t.FailNow()
	}
}

func (b *namesBed) startCoreDNS() {
	b.t.Helper()
	file := filepath.Join(b.folder, "Corefile")
	b.want(os.WriteFile(file, []byte(fmt.Sprintf(namesCorefile, b.folder+"/admin")), 0o600))
	b.starts("coredns", b.inside(filepath.Join(b.bin, "coredns"), "-conf", file), filepath.Join(b.folder, "coredns.log"))
}

// starts a program that ends with the test.
func (b *namesBed) starts(name string, c *exec.Cmd, path string) {
	b.t.Helper()
	log, err := os.Create(path)
	b.want(err)
	c.Stdout, c.Stderr = log, log
	if err := c.Start(); err != nil {
		b.t.Fatalf("start %s: %v", name, err)
	}
	b.t.Cleanup(func() { c.Process.Kill(); c.Wait(); log.Close() })
}

// startAgent runs millrace with a bpf file system and a cgroup of its own.
func (b *namesBed) startAgent() {
	b.t.Helper()
	pins := filepath.Join(b.folder, "bpf")
	b.want(os.Mkdir(pins, 0o700))
	b.want(unix.Mount("bpf", pins, "bpf", 0, "mode=0700"))
	b.t.Cleanup(func() { b.want(unix.Unmount(pins, unix.MNT_DETACH)) })
	group := filepath.Join(cgroup2(b.t), b.space)
	b.want(os.Mkdir(group, 0o755))
	b.t.Cleanup(func() { b.want(os.Remove(group)) })
	// In the namespace alone: `ip netns exec` would mount another /sys.
	b.starts("millrace", exec.Command("nsenter", "--net=/run/netns/"+b.space, b.millrace, "agent", "--source", "kube:"+b.folder+"/admin", "--node", "node-1",
		"--cgroup", group, "--pins", pins+"/millrace", "--run", b.run, "--metrics", "", "--dns", "cluster.local"), b.log)
}

// cgroup2 is where the hierarchy of version 2 is mounted.
func cgroup2(t *testing.T) string {
	t.Helper()
	for line := range strings.Lines(string(read(t, "/proc/self/mounts"))) {
		if fields := strings.Fields(line); len(fields) > 2 && fields[2] == "cgroup2" {
			return fields[1]
		}
	}
	t.Fatal("no cgroup2 is mounted: millrace needs one")
	return ""
}

// settled waits until both know what was written last.
func (b *namesBed) settled(names []string) {
	b.t.Helper()
	for who, at := range map[string]string{"CoreDNS": "/run/netns/" + b.space + " " + oracleAddress, "millrace": "/run/netns/" + b.pod + " " + dnsV4 + ":53"} {
		space, address, _ := strings.Cut(at, " ")
		err := until(b.t.Context(), who+" to know "+strings.Join(names, ", "), time.Minute, func() error {
			c, err := dialIn(space, "udp", address)
			if err != nil {
				return err
			}
			defer c.Close()
			for _, name := range names {
				m := new(dns.Msg).SetQuestion(name, dns.TypeA)
				text, err := m.Pack()
				if err != nil {
					return err
				}
				answer, err := exchange(c, text, 300*time.Millisecond)
				if err != nil {
					return err
				}
				if err := m.Unpack(answer); err != nil || m.Rcode != 0 || len(m.Answer) == 0 {
					return fmt.Errorf("%s: %s, %v", name, dns.RcodeToString[m.Rcode], err)
				}
			}
			return nil
		})
		if err != nil {
			b.t.Fatalf("%v\n%s\n%s", err, lastLines(string(read(b.t, b.log)), 8), lastLines(string(read(b.t, b.folder+"/coredns.log")), 8))
		}
	}
}

// exchange sends a query and waits for its answer.
func exchange(c net.Conn, query []byte, patience time.Duration) ([]byte, error) {
	buffer := make([]byte, 4096)
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, err
	}
	if _, err := c.Write(query); err != nil {
		return nil, err
	}
	for {
		n, err := c.Read(buffer)
		if err != nil {
			return nil, err
		}
		if n > 1 && buffer[0] == query[0] && buffer[1] == query[1] {
			return buffer[:n], nil
		}
	}
}

// ask puts queries to both, and compares.
func (b *namesBed) ask(town *town, round uint64, count int, sum *tally) {
	b.t.Helper()
	const workers = 4
	var askers sync.WaitGroup
	var lost atomic.Int64
	for worker := range workers {
		// Half of them over IPv6.
		resolver := []string{dnsV4 + ":53", "[" + dnsV6 + "]:53"}[worker%2]
		ours, err := dialIn("/run/netns/"+b.pod, "udp", resolver)
		b.want(err)
		theirs, err := dialIn("/run/netns/"+b.space, "udp", oracleAddress)
		b.want(err)
		random := rand.New(rand.NewPCG(round, uint64(worker)))
		askers.Go(func() {
			defer ours.Close()
			defer theirs.Close()
			for range count / workers {
				q := town.query(random)
				said, err := patiently(ours, q.message)
				if err != nil {
					lost.Add(1)
					b.t.Errorf("%s: no answer: %v", q, err)
					continue
				}
				wanted, err := patiently(theirs, q.message)
				if err != nil {
					b.t.Errorf("%s: CoreDNS does not answer: %v", q, err)
					continue
				}
				if difference := sum.note(q, said, wanted); difference != "" {
					b.t.Errorf("%s (%s): %s", q, q.kind, difference)
				}
				if b.t.Failed() && sum.failures.Add(1) > 20 {
					return
				}
			}
		})
	}
	askers.Wait()
}

// patiently asks again where the machine is too busy.
func patiently(c net.Conn, query []byte) (answer []byte, err error) {
	for range 3 {
		if answer, err = exchange(c, query, 5*time.Second); err == nil {
			return answer, nil
		}
	}
	return nil, err
}

// tally counts what became of the queries.
type tally struct {
	listed   map[string]string
	failures atomic.Int64

	mu                            sync.Mutex
	asked, oursToAnswer, passedUp int
	differences                   map[string]int
	passed, answered              map[string]int // by kind of query
	examples                      []string       // of what was passed up, and should not
}

// note compares two answers; it returns a difference that is not listed.
func (s *tally) note(q *query, said, wanted []byte) (difference string) {
	var ours, theirs dns.Msg
	if err := ours.Unpack(said); err != nil {
		return fmt.Sprintf("an answer that cannot be read, %v: %x", err, said)
	}
	if err := theirs.Unpack(wanted); err != nil {
		return fmt.Sprintf("CoreDNS' answer cannot be read, %v", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	if q.ours {
		s.oursToAnswer++
	}
	if ours.Rcode == dns.RcodeRefused {
		s.passed[q.kind]++
		if q.ours {
			s.passedUp++
			if s.passedUp <= 5 {
				s.examples = append(s.examples, q.String())
			}
		}
		return ""
	}
	s.answered[q.kind]++
	for _, d := range differ(q, &ours, &theirs) {
		if _, listed := s.listed[d.key]; !listed {
			difference += d.text + "; "
		}
		s.differences[d.key]++
	}
	return strings.TrimSuffix(difference, "; ")
}

// difference is one that may be listed in docs/dns.md under its key.
type difference struct{ key, text string }

// differ compares answers, but for the order of records and the zone's serial.
func differ(q *query, ours, theirs *dns.Msg) (all []difference) {
	add := func(key, format string, args ...any) {
		all = append(all, difference{key, fmt.Sprintf(format, args...)})
	}
	if ours.MsgHdr != theirs.MsgHdr {
		key := "header"
		if isNameServer(q.name) && ours.Rcode == dns.RcodeNameError {
			key = "ns.dns"
		}
		add(key, "the header is %+v, CoreDNS' %+v", ours.MsgHdr, theirs.MsgHdr)
		if key != "header" {
			return all // they speak of different things
		}
	}
	if !slices.Equal(ours.Question, theirs.Question) {
		add("question", "the question is %v, CoreDNS' %v", ours.Question, theirs.Question)
	}
	if ours.Truncated && theirs.Truncated {
		ours.Answer, theirs.Answer = nil, nil // which ones fit is a matter of their order
	}
	for section, pair := range map[string][2][]dns.RR{"answer": {ours.Answer, theirs.Answer}, "authority": {ours.Ns, theirs.Ns}} {
		if one, other := lines(pair[0]), lines(pair[1]); !slices.Equal(one, other) {
			add(section, "the %s section is %q, CoreDNS' %q", section, one, other)
		}
	}
	one, other := ours.IsEdns0(), theirs.IsEdns0()
	switch {
	case (one == nil) != (other == nil):
		add("edns", "EDNS is %v, CoreDNS' %v", one, other)
	case one == nil:
	case len(one.Option) == 0 && len(other.Option) == 1 && other.Option[0].Option() == dns.EDNS0COOKIE && one.Hdr.Ttl == other.Hdr.Ttl:
		add("edns-cookie", "there is no cookie, CoreDNS has %v", other.Option[0])
	case one.UDPSize() != other.UDPSize() && one.Hdr.Ttl == other.Hdr.Ttl && len(one.Option)+len(other.Option) == 0:
		add("edns-size", "the UDP size is %d, CoreDNS' %d", one.UDPSize(), other.UDPSize())
	case one.String() != other.String():
		add("edns", "EDNS is %v, CoreDNS' %v", one, other)
	}
	if one, other := lines(additional(ours)), lines(additional(theirs)); !slices.Equal(one, other) {
		add("additional", "the additional section is %q, CoreDNS' %q", one, other)
	}
	return all
}

// additional are the records of the additional section, without OPT.
func additional(m *dns.Msg) []dns.RR {
	return slices.DeleteFunc(slices.Clone(m.Extra), func(r dns.RR) bool { return r.Header().Rrtype == dns.TypeOPT })
}

// isNameServer: CoreDNS takes a name for that of the zone's own server that merely begins
// so, "ns.dns.cluster.local.shop.svc.cluster.local".
func isNameServer(name string) bool {
	return strings.HasPrefix(strings.ToLower(name), "ns.dns.cluster.local.")
}

// lines are records in an order of their own, without the serial.
func lines(records []dns.RR) (all []string) {
	for _, r := range records {
		if soa, ok := r.(*dns.SOA); ok {
			soa.Serial = 0
		}
		all = append(all, r.String())
	}
	slices.Sort(all)
	return all
}

// listedDifferences are the rows of the table in docs/dns.md: a key and its reason.
func listedDifferences(t *testing.T) map[string]string {
	t.Helper()
	const begin, end = "<!-- differences: read by test/cluster -->", "<!-- end of differences -->"
	_, rest, begins := strings.Cut(string(read(t, filepath.Join(root, "docs", "dns.md"))), begin)
	table, _, ends := strings.Cut(rest, end)
	listed := map[string]string{}
	for line := range strings.Lines(table) {
		if cells := strings.Split(line, "|"); len(cells) == 4 && strings.HasPrefix(strings.TrimSpace(cells[1]), "`") {
			listed[strings.Trim(cells[1], " `")] = strings.TrimSpace(cells[2])
		}
	}
	if !begins || !ends || len(listed) == 0 {
		t.Fatal("docs/dns.md lists no differences")
	}
	return listed
}

// tell says what became of the queries, and judges how many were passed up, and whether
// each listed difference is one.
func (s *tally) tell(t *testing.T, took time.Duration) {
	t.Helper()
	var text strings.Builder
	for _, kind := range slices.Sorted(maps.Keys(s.answered)) {
		fmt.Fprintf(&text, "\n%8d answered, %6d passed up: %s", s.answered[kind], s.passed[kind], kind)
	}
	for _, kind := range slices.Sorted(maps.Keys(s.passed)) {
		if s.answered[kind] == 0 {
			fmt.Fprintf(&text, "\n%8d answered, %6d passed up: %s", 0, s.passed[kind], kind)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(s.differences)) {
		fmt.Fprintf(&text, "\n%8d differ in %s: %s", s.differences[key], key, cmp.Or(s.listed[key], "not listed"))
	}
	share := float64(s.passedUp) / float64(max(s.oursToAnswer, 1))
	t.Logf("%d queries in %v; of %d that are to be answered here %d were passed up%s", s.asked, took.Round(time.Millisecond), s.oursToAnswer, s.passedUp, text.String())
	if s.oursToAnswer < s.asked/3 || share > mostPassedUp {
		t.Errorf("%d of %d queries that are to be answered here were passed up: %q", s.passedUp, s.oursToAnswer, s.examples)
	}
	for key := range s.listed {
		if s.differences[key] == 0 && !t.Failed() {
			t.Errorf("docs/dns.md lists a difference that is none: %s", key)
		}
	}
}
