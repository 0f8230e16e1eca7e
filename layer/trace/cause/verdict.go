package cause

import "net/netip"

// Confidence is how sure a verdict is.
type Confidence string

// High: the evidence fits nothing else. Medium: one thing else is possible, and said.
// Low: it is the most likely of several.
const (
	High   Confidence = "high"
	Medium Confidence = "medium"
	Low    Confidence = "low"
)

// Verdict is one cause of packets that died, or of connections that did not come about.
type Verdict struct {
	// Cause is the stable identifier: "conntrack-table-full". Docs list them.
	Cause string `json:"cause"`
	// Title is one sentence that names the object and the number.
	Title string `json:"title"`
	// Evidence says what was seen and where it was read.
	Evidence []string `json:"evidence"`
	// Not are the causes that it is not, each with the evidence against it.
	Not        []string   `json:"not"`
	Confidence Confidence `json:"confidence"`
	// Fix and Undo are commands, to be given on the node.
	Fix  string `json:"fix"`
	Undo string `json:"undo"`
	// Owner is whose the rule, program, socket, route or setting is.
	Owner string `json:"owner"`
	Where Where  `json:"where"`
	// Way is how such a packet comes to where it died, namespace by namespace, as the
	// routes are now; empty where that is not known.
	Way []Step `json:"way,omitempty"`
	// Tuple is one of those that were met; Packets how many died of it.
	Tuple   *Ends  `json:"tuple,omitempty"`
	Packets uint64 `json:"packets"`

	alike map[string]int // how often evidence of a kind was added
	// asked says that it is of an event that somebody asks about; others are packets of
	// such that nobody does.
	asked  bool
	others uint64
}

// Where is the place of a cause.
type Where struct {
	Node      string `json:"node,omitempty"`
	Namespace string `json:"namespace"`
	Pod       string `json:"pod,omitempty"`
	// Hook is the way of the packet where it died: "prerouting", "forward", "tc ingress",
	// "socket", "route" ...
	Hook      string `json:"hook,omitempty"`
	Interface string `json:"interface,omitempty"`
}

// Step is a namespace on the way of a packet.
type Step struct {
	Namespace string `json:"namespace"`
	Pod       string `json:"pod,omitempty"`
	// In and Out are the devices that it comes and goes by, "" where it begins or ends.
	In  string `json:"in,omitempty"`
	Out string `json:"out,omitempty"`
	// Route is the one that says so.
	Route string `json:"route,omitempty"`
	// Translation is what the namespace makes of the packet's addresses, by its
	// connection tracking: "destination 10.96.0.10:80 becomes 10.244.1.2:8080".
	Translation string `json:"translation,omitempty"`
}

// Ends are a Tuple as people and machines read it.
type Ends struct {
	Protocol    string         `json:"protocol"`
	Source      netip.AddrPort `json:"source"`
	Destination netip.AddrPort `json:"destination"`
	// SourceName and DestinationName are whose the addresses are, where that is known:
	// "pod shop/web-0", "service shop/web".
	SourceName      string `json:"source_name,omitempty"`
	DestinationName string `json:"destination_name,omitempty"`
}
