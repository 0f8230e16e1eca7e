package cluster

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/millrace/millrace/model"
)

func service(name, ip string, ports ...int32) *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.ServiceSpec{ClusterIP: ip}}
	for _, p := range ports {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: fmt.Sprint("p", p), Port: p})
	}
	return s
}

func slice80(name, service string, addresses ...string) *discoveryv1.EndpointSlice {
	port, number := "p80", int32(8080)
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &port, Port: &number}},
	}
	for _, a := range addresses {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a}})
	}
	return s
}

func pod(name, ip string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.PodStatus{PodIP: ip}}
}

func node(name string, ranges ...string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDRs: ranges}}
}

func set(t testing.TB, c *Cluster, objects ...runtime.Object) {
	t.Helper()
	for _, obj := range objects {
		if err := c.Set("test", obj); err != nil {
			t.Fatal(err)
		}
	}
}

// in says what is in a Snapshot, in a few words.
func in(s *model.Snapshot) string {
	var words []string
	for _, svc := range s.Services {
		var b strings.Builder
		fmt.Fprintf(&b, "%s%v", svc.Name.Name, svc.ClusterIPs)
		for _, p := range svc.Ports {
			fmt.Fprintf(&b, ":%d", p.Port)
			if p.NodePort != 0 {
				fmt.Fprintf(&b, "@%d", p.NodePort)
			}
			for _, e := range p.Backends {
				fmt.Fprintf(&b, ">%s", e.Address)
			}
		}
		words = append(words, b.String())
	}
	for _, p := range s.Pods {
		words = append(words, fmt.Sprint(p.Name.Name, p.Addresses))
	}
	for _, n := range s.Nodes {
		words = append(words, fmt.Sprint(n.Name, n.PodCIDRs))
	}
	for _, w := range s.Workloads {
		words = append(words, fmt.Sprint(w.Name.Name, "*", w.Replicas))
	}
	text := fmt.Sprintf("%s; %d problems", strings.Join(words, " "), len(s.Problems))
	if s.Unread != 0 {
		text += fmt.Sprintf(", %d unread", s.Unread)
	}
	return text
}

func want(t *testing.T, c *Cluster, when, text string) *model.Snapshot {
	t.Helper()
	s := c.Snapshot()
	if got := in(s); got != text {
		t.Errorf("%s there is\n%s\nand should be\n%s\n%v", when, got, text, s.Problems)
	}
	return s
}

func TestSliceMayComeFirst(t *testing.T) {
	c := New()
	set(t, c, slice80("a-1", "a", "10.1.0.1"))
	want(t, c, "without a Service", "; 0 problems")
	set(t, c, service("a", "10.0.0.1", 80))
	want(t, c, "with the Service", "a[10.0.0.1]:80>10.1.0.1:8080; 0 problems")
	set(t, c, slice80("a-1", "b", "10.1.0.1"))
	want(t, c, "with the slice moved to another Service", "a[10.0.0.1]:80; 0 problems")
	set(t, c, slice80("a-1", "a", "10.1.0.2"), slice80("a-2", "a", "10.1.0.1", "10.1.0.2"))
	want(t, c, "with two slices", "a[10.0.0.1]:80>10.1.0.1:8080>10.1.0.2:8080; 0 problems")
	c.Delete(KeyOf("Service", "", "a"))
	want(t, c, "without the Service", "; 0 problems")
	c.Delete(KeyOf("Service", "", "a"))
}

func TestFaultyVersionLeavesTheLastOne(t *testing.T) {
	c := New()
	set(t, c, service("a", "10.0.0.1", 80), service("b", "10.0.0.2", 80, 0))
	before := want(t, c, "at first", "a[10.0.0.1]:80 b[10.0.0.2]:80; 1 problems, 1 unread")
	set(t, c, service("a", "10.0.0.1", 81, 0), service("b", "10.0.0.2", 81, 0))
	after := want(t, c, "with a fault", "a[10.0.0.1]:80 b[10.0.0.2]:81; 2 problems, 1 unread")
	if before.Services[0] != after.Services[0] {
		t.Error("a Service that stayed in force is another one")
	}
	set(t, c, service("a", "10.0.0.1", 81), service("b", "10.0.0.2", 82))
	want(t, c, "mended", "a[10.0.0.1]:81 b[10.0.0.2]:82; 0 problems")
}

func TestOlderKeepsTheAddress(t *testing.T) {
	c := New()
	old := service("z", "10.0.0.1", 80)
	old.CreationTimestamp = metav1.NewTime(time.Unix(1, 0))
	young := service("a", "10.0.0.1", 80)
	young.CreationTimestamp = metav1.NewTime(time.Unix(2, 0))
	set(t, c, young)
	want(t, c, "with one claim", "a[10.0.0.1]:80; 0 problems")
	set(t, c, old, pod("p", "10.1.0.1"), pod("o", "10.1.0.1"))
	s := want(t, c, "with two claims", "z[10.0.0.1]:80 o[10.1.0.1]; 2 problems")
	if text := s.Problems[1].Error(); !strings.Contains(text, "Service default/a") || !strings.Contains(text, "Service default/z") {
		t.Errorf("the problem does not name both: %s", text)
	}
	c.Delete(KeyOf("Service", "", "z"))
	set(t, c, pod("o", "10.1.0.2"))
	want(t, c, "with the clash over", "a[10.0.0.1]:80 o[10.1.0.2] p[10.1.0.1]; 0 problems")
}

// Only the node port is lost to an older Service, and it comes back.
func TestOlderKeepsTheNodePort(t *testing.T) {
	c := New()
	young := onNodes(service("a", "10.0.0.1", 80, 81), 30080)
	young.CreationTimestamp = metav1.NewTime(time.Unix(2, 0))
	set(t, c, young)
	want(t, c, "with one claim", "a[10.0.0.1]:80@30080:81; 0 problems")
	set(t, c, onNodes(service("z", "10.0.0.2", 80), 30080))
	s := want(t, c, "with two claims", "a[10.0.0.1]:80:81 z[10.0.0.2]:80@30080; 1 problems")
	if text := s.Problems[0].Error(); !strings.Contains(text, "node port 30080/tcp belongs to Service default/z") {
		t.Errorf("the problem does not say who has the port: %s", text)
	}
	set(t, c, slice80("a-1", "a", "10.1.0.1"), young)
	want(t, c, "with an endpoint", "a[10.0.0.1]:80>10.1.0.1:8080:81 z[10.0.0.2]:80@30080; 1 problems")
	udp := onNodes(service("z", "10.0.0.2", 80), 30080)
	udp.Spec.Ports[0].Protocol = corev1.ProtocolUDP
	set(t, c, udp)
	want(t, c, "with another protocol", "a[10.0.0.1]:80@30080>10.1.0.1:8080:81 z[10.0.0.2]:80@30080; 0 problems")
	set(t, c, onNodes(service("z", "10.0.0.2", 80), 30080))
	c.Delete(KeyOf("Service", "", "z"))
	want(t, c, "with the clash over", "a[10.0.0.1]:80@30080>10.1.0.1:8080:81; 0 problems")
}

// A Service that another proxy serves is not ours from then on, and again later.
func TestServiceOfAnotherProxy(t *testing.T) {
	c := New()
	theirs := change(service("a", "10.0.0.1", 80), func(s *corev1.Service) { s.Labels = map[string]string{serviceProxyName: "mesh"} })
	set(t, c, service("a", "10.0.0.1", 80), slice80("a-1", "a", "10.1.0.1"))
	want(t, c, "at first", "a[10.0.0.1]:80>10.1.0.1:8080; 0 problems")
	set(t, c, theirs)
	if s := want(t, c, "labelled", "; 0 problems"); s.Ignored["Service of another proxy"] != 1 || len(s.Others) != 1 || s.Others[0].Name != "a" {
		t.Errorf("it is not counted: %v, %v", s.Ignored, s.Others)
	}
	set(t, c, service("b", "10.0.0.1", 80), service("a", "10.0.0.2", 80))
	if s := want(t, c, "ours again", "a[10.0.0.2]:80>10.1.0.1:8080 b[10.0.0.1]:80; 0 problems"); s.Ignored != nil || s.Others != nil {
		t.Errorf("it is still counted: %v", s.Ignored)
	}
}

// Each of these, changed alone, makes another Service or endpoint.
func TestEveryFieldIsAChange(t *testing.T) {
	lb := func(s *corev1.Service) {
		s.Spec.Type = corev1.ServiceTypeLoadBalancer
		s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "192.0.2.1"}}
	}
	local := corev1.ServiceInternalTrafficPolicyLocal
	for about, f := range map[string]func(*corev1.Service){
		"node port":     func(s *corev1.Service) { s.Spec.Ports[0].NodePort = 30080 },
		"external IP":   func(s *corev1.Service) { s.Spec.ExternalIPs = []string{"198.51.100.1"} },
		"load balancer": func(s *corev1.Service) { s.Status.LoadBalancer.Ingress[0].IP = "192.0.2.2" },
		"proxy mode": func(s *corev1.Service) {
			mode := corev1.LoadBalancerIPModeProxy
			s.Status.LoadBalancer.Ingress[0].IPMode = &mode
		},
		"ranges":   func(s *corev1.Service) { s.Spec.LoadBalancerSourceRanges = []string{"203.0.113.0/24"} },
		"internal": func(s *corev1.Service) { s.Spec.InternalTrafficPolicy = &local },
		"external": func(s *corev1.Service) { s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal },
		"affinity": func(s *corev1.Service) { s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP },
		"health check": func(s *corev1.Service) {
			s.Spec.ExternalTrafficPolicy, s.Spec.HealthCheckNodePort = corev1.ServiceExternalTrafficPolicyLocal, 32000
		},
	} {
		c := New()
		set(t, c, change(service("a", "10.0.0.1", 80), lb), slice80("a-1", "a", "10.1.0.1"))
		before := c.Snapshot()
		set(t, c, change(change(service("a", "10.0.0.1", 80), lb), f))
		if after := c.Snapshot(); after.Services[0] == before.Services[0] || len(after.Problems) > 0 {
			t.Errorf("%s changed nothing, or is a problem: %v", about, after.Problems)
		}
	}
	c := New()
	set(t, c, service("a", "10.0.0.1", 80), slice80("a-1", "a", "10.1.0.1"))
	before := c.Snapshot()
	set(t, c, change(slice80("a-1", "a", "10.1.0.1"), func(s *discoveryv1.EndpointSlice) {
		s.Endpoints[0].Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: "z"}}}
	}))
	hints := c.Snapshot().Services[0].Ports[0].Backends[0].Hints
	if _, named := hints.Zones("z"); c.Snapshot() == before || !named {
		t.Error("hints changed nothing")
	}
}

func TestOverlappingRanges(t *testing.T) {
	c := New()
	set(t, c, node("c", "10.0.0.0/8"), node("a", "10.1.0.0/16", "fd00::/64"), node("b", "10.1.2.0/24", "10.2.0.0/16"))
	want(t, c, "with three Nodes", "a[10.1.0.0/16 fd00::/64] b[10.2.0.0/16] c[]; 2 problems")
	c.Delete(KeyOf("Node", "", "a"))
	want(t, c, "with two", "b[10.1.2.0/24 10.2.0.0/16] c[]; 1 problems")
	c.Delete(KeyOf("Node", "", "b"))
	want(t, c, "with one", "c[10.0.0.0/8]; 0 problems")
}

func TestNumberGrowsWithChangesOnly(t *testing.T) {
	c := New()
	first := c.Snapshot()
	if c.SetComplete(); c.Snapshot() == first {
		t.Error("becoming complete made no new Snapshot")
	}
	set(t, c, service("a", "10.0.0.1", 80), pod("p", "10.1.0.1"))
	second := c.Snapshot()
	set(t, c, service("a", "10.0.0.1", 80), pod("p", "10.1.0.1"), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "n"}})
	if third := c.Snapshot(); third != second || second.Number != 2 || !second.Complete {
		t.Errorf("the same again made Snapshot %d of %d, complete %v", third.Number, second.Number, second.Complete)
	}
	problems, ignored := []model.Problem{{Where: "file:2", Text: "x"}}, map[string]int{"Ingress": 2}
	c.Remark("file", Remark{problems, 0, ignored})
	fourth := c.Snapshot()
	if fourth.Number != 3 || len(fourth.Problems) != 1 || fourth.Ignored["Ingress"] != 2 {
		t.Errorf("a remark made %+v", fourth)
	}
	if c.Remark("file", Remark{slices.Clone(problems), 0, ignored}); c.Snapshot() != fourth {
		t.Error("the same remark made a new Snapshot")
	}
	c.Remark("file", Remark{problems, 3, ignored})
	if fifth := c.Snapshot(); fifth.Number != 4 || fifth.Unread != 3 {
		t.Errorf("with 3 unread there is Snapshot %d of %d unread", fifth.Number, fifth.Unread)
	}
	if c.Remark("file", Remark{}); c.Snapshot().Ignored != nil || c.Snapshot().Unread != 0 {
		t.Error("a remark taken back stays")
	}
}

func TestUnchangedKeepsItsPointer(t *testing.T) {
	c := New()
	set(t, c, service("a", "10.0.0.1", 80), service("b", "10.0.0.2", 80), slice80("b-1", "b", "10.1.0.1"), pod("p", "10.1.0.1"), node("n"),
		&appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: "d"}})
	one := c.Snapshot()
	set(t, c, slice80("b-1", "b", "10.1.0.1", "10.1.0.2"))
	two := c.Snapshot()
	if one.Services[0] != two.Services[0] || one.Pods[0] != two.Pods[0] || one.Nodes[0] != two.Nodes[0] || one.Workloads[0] != two.Workloads[0] {
		t.Error("an object that did not change is another one")
	}
	if one.Services[1] == two.Services[1] || len(one.Services[1].Ports[0].Backends) != 1 {
		t.Error("the Service that changed is the same, or changed in the Snapshot of before")
	}
	set(t, c, slice80("b-2", "b", "10.1.0.1"))
	if three := c.Snapshot(); three.Services[1] != two.Services[1] {
		t.Error("a slice that adds nothing made another Service")
	}
}

func TestInputMayChangeLater(t *testing.T) {
	c := New()
	svc, sl, p, n := service("a", "10.0.0.1", 80), slice80("a-1", "a", "10.1.0.1"), pod("p", "10.1.0.1"), node("n", "10.1.0.0/16")
	svc.Spec.Selector, svc.Annotations = map[string]string{"k": "v"}, map[string]string{"k": "v"}
	p.Labels, n.Labels = map[string]string{"k": "v"}, map[string]string{"k": "v"}
	set(t, c, svc, sl, p, n)
	s := c.Snapshot()
	for _, m := range []map[string]string{svc.Spec.Selector, svc.Annotations, p.Labels, n.Labels} {
		m["k"] = "changed"
	}
	svc.Spec.Ports[0].Port, *sl.Ports[0].Port, sl.Endpoints[0].Addresses[0] = 1, 1, "10.1.0.9"
	sv := s.Services[0]
	if sv.Selector["k"] != "v" || sv.Annotations["k"] != "v" || s.Pods[0].Labels["k"] != "v" || s.Nodes[0].Labels["k"] != "v" {
		t.Error("a map of the input is a map of the Snapshot")
	}
	if b := sv.Ports[0].Backends[0].Address; sv.Ports[0].Port != 80 || b != netip.MustParseAddrPort("10.1.0.1:8080") {
		t.Errorf("writing to the input changed the Snapshot: %d -> %s", sv.Ports[0].Port, b)
	}
}

func TestReadRefusesOtherTypes(t *testing.T) {
	if err := New().Set("test", &corev1.Secret{}); err == nil || !strings.Contains(err.Error(), "Secret") {
		t.Errorf("a Secret was taken: %v", err)
	}
}

// TestSameObjectsSameSnapshot goes many ways through clashing objects and
// compares where they end with a Cluster that sees only the end, in any order.
func TestSameObjectsSameSnapshot(t *testing.T) {
	for seed := range uint64(300) {
		random := rand.New(rand.NewPCG(seed, 0))
		c, end := New(), map[Key]runtime.Object{}
		for range 40 {
			obj := arbitrary(random)
			k := KeyOf(Kind(obj), "", obj.(metav1.Object).GetName())
			if random.IntN(4) == 0 {
				c.Delete(k)
				delete(end, k)
			} else {
				set(t, c, obj)
				end[k] = obj
			}
			if random.IntN(3) == 0 {
				c.Snapshot()
			}
		}
		fresh := New()
		for _, obj := range end { // in the order of a map, which is none
			set(t, fresh, obj)
		}
		got, want := *c.Snapshot(), *fresh.Snapshot()
		got.Number, want.Number = 0, 0
		if in(&got) != in(&want) || !sameSnapshot(&got, &want) {
			t.Fatalf("seed %d: after a long way there is\n%s %v\nand at once\n%s %v", seed, in(&got), got.Problems, in(&want), want.Problems)
		}
	}
}

func sameSnapshot(a, b *model.Snapshot) bool {
	return reflect.DeepEqual(values(a.Services), values(b.Services)) && reflect.DeepEqual(values(a.Pods), values(b.Pods)) &&
		reflect.DeepEqual(values(a.Nodes), values(b.Nodes)) && reflect.DeepEqual(values(a.Workloads), values(b.Workloads)) &&
		slices.Equal(a.Problems, b.Problems) && a.Unread == b.Unread
}

func values[T any](list []*T) []T {
	var out []T
	for _, p := range list {
		out = append(out, *p)
	}
	return out
}

// arbitrary is an object without faults that may well clash with others.
func arbitrary(random *rand.Rand) runtime.Object {
	name := string(rune('a' + random.IntN(4)))
	ip := func(net string) string { return fmt.Sprintf("%s.%d", net, 1+random.IntN(3)) }
	switch random.IntN(6) {
	case 0, 1:
		s := service(name, ip("10.0.0"), 80)
		if random.IntN(2) == 0 {
			s.Spec.ClusterIPs = []string{s.Spec.ClusterIP, fmt.Sprintf("fd00::%d", 1+random.IntN(3))}
		}
		s.CreationTimestamp = metav1.NewTime(time.Unix(int64(random.IntN(3)), 0))
		switch random.IntN(4) {
		case 0:
			onNodes(s, 30080+int32(random.IntN(2)))
		case 1:
			s.Labels = map[string]string{serviceProxyName: "mesh"}
		}
		return s
	case 2:
		s := slice80(name, string(rune('a'+random.IntN(4))), ip("10.1.0"), ip("10.1.0"))
		for i := range s.Endpoints {
			if random.IntN(2) == 0 {
				s.Endpoints[i].Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: string(rune('x' + random.IntN(2)))}}}
			}
		}
		return s
	case 3:
		return pod(name, ip("10.1.0"))
	case 4:
		ranges := []string{"10.0.0.0/12", "10.0.0.0/13", "10.8.0.0/13", "10.16.0.0/12"}
		return node(name, ranges[random.IntN(len(ranges))])
	}
	n := int32(random.IntN(3))
	return &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: appsv1.DeploymentSpec{Replicas: &n}}
}

// BenchmarkSnapshotOneChange is one changed EndpointSlice among many Services of
// four endpoints each, from Set to the new Snapshot.
func BenchmarkSnapshotOneChange(b *testing.B) {
	for _, services := range []int{10_000, 100_000} {
		b.Run(fmt.Sprint(services), func(b *testing.B) {
			c := New()
			address := func(i, j int) string { return fmt.Sprintf("10.%d.%d.%d", i>>14, i>>6&255, i&63<<2|j) }
			for i := range services {
				name := fmt.Sprint("s", i)
				set(b, c, service(name, fmt.Sprintf("172.%d.%d.%d", 16+i>>16, i>>8&255, i&255), 80),
					slice80(name, name, address(i, 0), address(i, 1), address(i, 2), address(i, 3)))
			}
			changed := [2]*discoveryv1.EndpointSlice{slice80("s7", "s7", "10.200.0.1"), slice80("s7", "s7", "10.200.0.2")}
			c.Snapshot()
			i := 0
			for b.Loop() {
				set(b, c, changed[i&1])
				if c.Snapshot().Number != uint64(i+2) {
					b.Fatal("the change made no new Snapshot")
				}
				i++
			}
		})
	}
}
