package doctor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
)

// in replaces a part of the cluster's manifests, wherever it is.
func in(old, text string) func(*world) {
	return func(w *world) {
		if !strings.Contains(w.objects, old) {
			panic(fmt.Sprintf("no manifest has %q", old))
		}
		w.objects = strings.ReplaceAll(w.objects, old, text)
	}
}

// more adds an object.
func more(object string) func(*world) {
	return func(w *world) { w.objects += "---\n" + object + "\n" }
}

// many adds n objects, in which %d is a number.
func many(n int, object string) func(*world) {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "---\n"+object+"\n", i)
	}
	return func(w *world) { w.objects += b.String() }
}

const (
	manyOfThem = `{apiVersion: v1, kind: Service, metadata: {name: s%d, namespace: big}, spec: {clusterIP: None}}`
	balanced   = `{apiVersion: v1, kind: Service, metadata: {name: edge, namespace: ingress-nginx, uid: u, annotations: {service.beta.kubernetes.io/aws-load-balancer-connection-idle-timeout: "%s"}}, spec: {type: LoadBalancer, externalTrafficPolicy: Local, clusterIP: 10.96.0.30, selector: {app: nginx}}, status: {loadBalancer: {ingress: [{ip: 198.51.100.1}]}}}`
	nginxRuns  = `{apiVersion: apps/v1, kind: Deployment, metadata: {name: nginx, namespace: ingress-nginx, uid: u}, spec: {template: {metadata: {labels: {app: nginx}}, spec: {terminationGracePeriodSeconds: 300, containers: [{name: c, image: "registry.k8s.io/ingress-nginx/controller:v1.13.0@sha256:12"}]}}}}`
	calico     = `{apiVersion: apps/v1, kind: DaemonSet, metadata: {name: calico-node, namespace: kube-system, uid: u}, spec: {template: {spec: {priorityClassName: system-node-critical}}}}`
	pool       = `{apiVersion: crd.projectcalico.org/v1, kind: IPPool, metadata: {name: default, uid: u}, spec: {cidr: %s, ipipMode: Always, vxlanMode: Never}}`
	cilium     = `kube-proxy-replacement: "false"`
	replaced   = `kube-proxy-replacement: "true"`
	// Of the DNS servers: their Deployment, and who scales it.
	dnsDeployment = `{apiVersion: apps/v1, kind: Deployment, metadata: {name: coredns, namespace: kube-system}, spec: {template: {metadata: {labels: {k8s-app: kube-dns}}}}}`
	dnsAutoscaler = `{apiVersion: autoscaling/v2, kind: HorizontalPodAutoscaler, metadata: {name: %s, namespace: kube-system}, spec: {scaleTargetRef: {kind: Deployment, name: coredns}, maxReplicas: 9}}`
	proportional  = `{apiVersion: apps/v1, kind: Deployment, metadata: {name: dns-scaler, namespace: kube-system}, spec: {template: {spec: {containers: [{name: a, image: "registry.k8s.io/cpa/cluster-proportional-autoscaler-amd64:1.8.9", args: [--target=Deployment/coredns]}]}}}}`
	loadBal       = `{apiVersion: v1, kind: Service, metadata: {name: lb, namespace: shop%s}, spec: {type: LoadBalancer, externalTrafficPolicy: %s, clusterIP: 10.96.0.31}, status: {loadBalancer: {ingress: [%s]}}}`
	netPod        = `{apiVersion: v1, kind: Pod, metadata: {name: p, namespace: %s}, spec: {hostNetwork: true, dnsPolicy: ClusterFirst, initContainers: [{name: tune, command: [sh, -c, %q]}]}, status: {phase: Running}}`
)

// oneServer is ready of two.
var oneServer = in("{ip: 10.244.1.2}], conditions: [{type: Ready, status: \"True\"}]", "{ip: 10.244.1.2}], conditions: [{type: Ready, status: \"False\"}]")

// clusterFires are the stories of objects.
var clusterFires = []story{
	{"PX-01", "many", all(in("mode: nftables", "mode: \"\""), many(1001, manyOfThem)), Warn, `cluster | configmaps | mode "", and 1,003 Services`},
	{"PX-03", "an old kernel", in("6.1.0-40-amd64", "5.10.0-30-amd64"), Fail, "Node n1 | nodes | kernel 5.10.0-30-amd64"},
	{"PX-04", "one address", in("nodePortAddresses: [192.0.2.0/24]", "nodePortAddresses: []"), Warn, "1 Services have NodePorts: shop/web"},
	{"PX-10", "nothing said", in("clusterCIDR: 10.244.0.0/16", ""), Warn, "and no clusterCIDR"},
	{"PX-12", "none ready", in("ready: true}, targetRef: {kind: Pod, name: web", "ready: false}, targetRef: {kind: Pod, name: web"), Warn, "Service shop/web | endpointslices.discovery.k8s.io | none of its endpoints is ready"},
	{"PX-12", "a wrong selector", in("name: web-1, namespace: shop, uid: u, labels: {kubernetes.io/service-name: web}", "name: web-1, namespace: shop, uid: u, labels: {kubernetes.io/service-name: other}"), Warn, "Service shop/web | endpointslices.discovery.k8s.io | no endpoints"},
	{"PX-12", "a Deployment without pods", all(in("name: web-1, namespace: shop, uid: u, labels: {kubernetes.io/service-name: web}", "name: web-1, namespace: shop, uid: u, labels: {kubernetes.io/service-name: other}"),
		more(`{apiVersion: apps/v1, kind: Deployment, metadata: {name: web, namespace: shop}, spec: {replicas: 0, template: {metadata: {labels: {app: web}}}}}`)), Warn, "Service shop/web | deployments.apps | no endpoints: its Deployment has replicas: 0"},
	{"PX-13", "of a cloud", more(fmt.Sprintf(loadBal, ", uid: u", "Cluster", "{ip: 198.51.100.7}")), Warn, "Service shop/lb | services | externalTrafficPolicy: Cluster"},
	{"PX-14", "endpoints", in("- {addresses: [10.244.0.3]", "- {addresses: [10.9.9.9]}\n"+strings.Repeat("- {addresses: [10.9.9.8]}\n", 250)+"- {addresses: [10.244.0.3]"), Warn, "Service shop/web | endpointslices.discovery.k8s.io | 253 endpoints; tested with 250"},
	{"PX-14", "of a namespace", many(5001, manyOfThem), Warn, "Namespace big | services | 5,001 Services; tested with 5,000"},
	{"PX-17", "ipvs", in("mode: nftables", "mode: ipvs"), Warn, "mode: ipvs"},
	{"PX-18", "of an old article", all(in("mode: nftables", "mode: iptables"), in("minSyncPeriod: 1s", "minSyncPeriod: 10s")), Warn, "iptables.minSyncPeriod: 10s"},
	{"PX-18", "an hour", all(in("mode: nftables", "mode: iptables"), in("syncPeriod: 30s", "syncPeriod: 1h0m0s")), Warn, "iptables.syncPeriod: 1h"},
	{"PX-19", "one's own address", in("type: NodePort, ", "type: NodePort, externalIPs: [192.0.2.9], "), Warn, "Service shop/web | services | externalIPs: 192.0.2.9"},
	{"PX-20", "no such name", in("targetPort: 8080", "targetPort: http"), Warn, "targetPort http, which none of its 2 pods has"},
	{"PX-21", "one node without", all(in("type: NodePort, ", "type: NodePort, internalTrafficPolicy: Local, "), in("nodeName: n2, conditions: {ready: true}, targetRef: {kind: Pod, name: web", "nodeName: n1, conditions: {ready: true}, targetRef: {kind: Pod, name: web")), Warn, "no ready endpoint on n2"},
	{"PX-22", "no provider", more(fmt.Sprintf(loadBal, ", uid: u", "Local", "")), Warn, "Service shop/lb | services | no address"},
	{"PX-23", "two", in(cilium, replaced), Warn, "DaemonSet kube-system/kube-proxy | daemonsets.apps | 2 pods"},
	{"PX-24", "another range", in("clusterCIDR: 10.244.0.0/16", "clusterCIDR: 10.244.0.0/24"), Warn, "Node n2 | nodes | podCIDR 10.244.1.0/24 is not within clusterCIDR"},
	{"PX-25", "a pod that is gone", in("name: web-2, namespace: shop}}", "name: web-9, namespace: shop}}"), Warn, "EndpointSlice shop/web-1 | endpointslices.discovery.k8s.io | 10.244.1.3 is pod shop/web-9"},
	{"CT-14", "many cores", in(`cpu: "4"`, `cpu: "64"`), Warn, "64 cores, Kubernetes v1.36.3: 1048576, and 2097152 before 1.36"},
	{"DN-01", "the usual value", in("dnsConfig: {options: [{name: ndots, value: \"2\"}]}, ", ""), Warn, "2 pods have ndots:5"},
	{"DN-02", "one", in("{ip: 10.244.1.2}], conditions: [{type: Ready, status: \"True\"}]", "{ip: 10.244.1.2}], conditions: [{type: Ready, status: \"False\"}]"), Warn, "1 DNS pods are ready; 2 nodes with 8 cores want 2"},
	{"DN-02", "a large cluster", in(`cpu: "4"`, `cpu: "512"`), Warn, "want 4"},
	{"DN-03", "together", in("spec: {nodeName: n2, dnsPolicy: Default", "spec: {nodeName: n1, dnsPolicy: Default"), Warn, "2 DNS pods, all on node n1"},
	{"DN-04", "too little", in("memory: 170Mi", "memory: 40Mi"), Warn, "limits.memory 40Mi; 4 pods and 2 Services want 49 MB"},
	{"DN-05", "none", in("        cache 30\n", ""), Warn, "no plug-in cache"},
	{"DN-12", "one dot", in("value: \"2\"", "value: \"1\""), Warn, "Pod shop/web-1 | pods | ndots:1"},
	{"DN-13", "itself", in("forward . /etc/resolv.conf", "forward . 10.96.0.10"), Fail, "forward . 10.96.0.10"},
	{"DN-13", "loopback", in("forward . /etc/resolv.conf", "forward . 127.0.0.1:53"), Fail, "forward . 127.0.0.1:53"},
	{"DN-14", "at once", in("           lameduck 5s\n", ""), Warn, "health without lameduck"},
	{"DN-15", "insecure", in("        cache 30\n", "        cache 30\n        autopath @kubernetes\n"), Warn, "autopath @kubernetes without pods verified"},
	{"DN-16", "limited", in("limits: {memory: 170Mi}", "limits: {memory: 170Mi, cpu: 100m}"), Warn, "Pod kube-system/coredns-1 | pods | coredns: limits.cpu 100m"},
	{"DN-17", "the node's servers", more(fmt.Sprintf(netPod, "shop", "true")), Warn, "Pod shop/p | pods | hostNetwork"},
	{"DN-18", "another address", in("clusterDNS: [10.96.0.10]", "clusterDNS: [10.100.0.10]"), Fail, "clusterDNS: 10.100.0.10; the Service kube-dns has 10.96.0.10"},
	{"DN-19", "no policy", all(in(cilium, replaced), in("name: kube-proxy, namespace: kube-system, uid: u}\nspec: {template", "name: node-local-dns, namespace: kube-system, uid: u}\nspec: {template")), Warn, "DaemonSet kube-system/node-local-dns"},
	{"DN-20", "all", in("        errors\n", "        errors\n        log\n"), Warn, "Corefile: log"},
	{"CN-01", "an old word", in(cilium, "kube-proxy-replacement: strict"), Fail, "kube-proxy-replacement: strict"},
	{"CN-02", "legacy", in(cilium, replaced+`, enable-host-legacy-routing: "true"`), Warn, "enable-host-legacy-routing: true"},
	{"CN-03", "iptables", in(cilium, replaced), Warn, "enable-bpf-masquerade: \"\""},
	{"CN-04", "one node without", in("status: {desiredNumberScheduled: 2, numberReady: 2}", "status: {desiredNumberScheduled: 2, numberReady: 1}"), Fail, "DaemonSet kube-flannel/kube-flannel-ds | daemonsets.apps | 1 of 2 are ready"},
	{"CN-04", "a node away", all(in("status: {desiredNumberScheduled: 2, numberReady: 2}", "status: {desiredNumberScheduled: 2, numberReady: 1}"), in("{type: NetworkUnavailable", "{type: Ready, status: Unknown}, {type: NetworkUnavailable")), Warn, "Nodes n1 | nodes | not Ready, and with them pods of kube-flannel/kube-flannel-ds"},
	{"DN-02", "an autoscaler", all(oneServer, more(dnsDeployment), more(fmt.Sprintf(dnsAutoscaler, "dns"))), Warn, `patch hpa dns --type merge -p '{"spec":{"minReplicas":2,"maxReplicas":9}}'`},
	{"DN-02", "one by the cluster's size", all(oneServer, more(dnsDeployment), more(proportional)), Warn, "min 2, or smaller coresPerReplica"},
	{"DN-21", "two", all(more(dnsDeployment), more(fmt.Sprintf(dnsAutoscaler, "dns")), more(proportional)), Warn, "HorizontalPodAutoscaler kube-system/dns and Deployment kube-system/dns-scaler (cluster-proportional-autoscaler)"},
	{"CN-05", "two nodes", in("podCIDR: 10.244.1.0/24, podCIDRs: [10.244.1.0/24]", "podCIDR: 10.244.0.128/25"), Fail, "podCIDR of node n1 10.244.0.0/24 and podCIDR of node n2 10.244.0.128/25"},
	{"CN-05", "a Service", in("10.96.0.20", "10.244.0.20"), Fail, "and Service shop/web 10.244.0.20/32"},
	{"CN-05", "Calico's pool and the nodes", more(fmt.Sprintf(pool, "192.0.0.0/16")), Fail, "pool default 192.0.0.0/16 and node n1 192.0.2.1/32"},
	{"CN-06", "a small range", in("podCIDR: 10.244.0.0/24, podCIDRs: [10.244.0.0/24]", "podCIDR: 10.244.0.2/31"), Warn, "Node n1 | pods | 2 pods have addresses of 10.244.0.2/31, which has 2"},
	{"CN-07", "a smaller range", in("cidrs: [10.96.0.0/16]", "cidrs: [10.96.0.10/32]"), Warn, "ServiceCIDR kubernetes | services | 1 ClusterIPs of 10.96.0.10/32, which has 1"},
	{"CN-08", "no route", in(`status: "False", reason: FlannelIsUp`, `status: "True", reason: NoRouteCreated`), Fail, "Node n1 | nodes | NetworkUnavailable: NoRouteCreated"},
	{"CN-09", "no Typha", all(more(calico), many(60, "{apiVersion: v1, kind: Node, metadata: {name: m%d}}")), Warn, "62 nodes, and no calico-typha"},
	{"CN-09", "one mesh", all(more(calico), more(fmt.Sprintf(pool, "10.244.0.0/16")), many(100, "{apiVersion: v1, kind: Node, metadata: {name: m%d}}")), Warn, "102 nodes in one mesh"},
	{"CN-11", "no DNS", in("ports: [{protocol: UDP, port: 53}, {protocol: TCP, port: 53}]", "ports: [{protocol: TCP, port: 443}]"), Warn, "NetworkPolicy shop/web | networkpolicies.networking.k8s.io | pods shop/web-1, shop/web-2 may not send to UDP port 53"},
	{"CN-11", "only UDP", in("{protocol: UDP, port: 53}, {protocol: TCP, port: 53}", "{protocol: UDP, port: 53}"), Warn, "may not send to TCP port 53"},
	{"CN-11", "another namespace", in("kubernetes.io/metadata.name: kube-system}}, podSelector", "kubernetes.io/metadata.name: dns}}, podSelector"), Warn, "UDP port 53"},
	{"CN-12", "two zones", in("public-ip: 192.0.2.2}, labels: {topology.kubernetes.io/zone: a}", "public-ip: 192.0.2.2}, labels: {topology.kubernetes.io/zone: b}"), Warn, "Service shop/web | endpointslices.discovery.k8s.io | endpoints in a, b"},
	{"CN-15", "flannel alone", in(`, {name: kube-network-policies, image: "kube-network-policies:v0.9"}`, ""), Warn, "DaemonSet kube-flannel/kube-flannel-ds"},
	{"CN-16", "none", in("terminationGracePeriodSeconds: 30", "terminationGracePeriodSeconds: 0"), Warn, "Pod shop/web-1 | pods | terminationGracePeriodSeconds: 0, behind Service shop/web"},
	{"CN-17", "a long sleep", in("sleep: {seconds: 5}", "sleep: {seconds: 30}"), Warn, "Pod shop/web-1 | pods | web: preStop sleeps 30 s"},
	{"CN-17", "a command", in("sleep 5", "sleep 60"), Warn, "Pod shop/web-2 | pods | web: preStop sleeps 60 s"},
	{"CN-18", "no probe", in("name: web, readinessProbe: {}, ", "name: web, "), Warn, "Pod shop/web-1 | pods | no readinessProbe"},
	{"CN-19", "a plug-in", in("priorityClassName: system-node-critical, containers: [{name: kube-flannel", "containers: [{name: kube-flannel"), Warn, "DaemonSet kube-flannel/kube-flannel-ds"},
	{"CN-19", "DNS", in("priorityClassName: system-cluster-critical", "priorityClassName: high"), Warn, `Pod kube-system/coredns-1 | pods | priorityClassName "high"`},
	{"CN-20", "two pods", in("podIPs: [{ip: 10.244.1.3}]", "podIPs: [{ip: 10.244.0.3}]"), Fail, "10.244.0.3: pod shop/web-1, pod shop/web-2"},
	{"CN-20", "two nodes", in("address: 192.0.2.2}", "address: 192.0.2.1}"), Fail, "192.0.2.1: node n1, node n2"},
	{"CN-21", "none given", in("spec: {podCIDR: 10.244.1.0/24, podCIDRs: [10.244.1.0/24]}", "spec: {}"), Fail, "Node n2 | nodes | no podCIDR"},
	{"CN-22", "the example's", in(`"Network": "10.244.0.0/16"`, `"Network": "10.10.0.0/16"`), Fail, "Node n1 | nodes | podCIDR 10.244.0.0/24 is not within flannel's Network"},
	{"CN-23", "Vagrant", in("public-ip: 192.0.2.2", "public-ip: 192.0.2.1"), Fail, "public-ip of n1, n2: 192.0.2.1"},
	{"CN-24", "limited", in(`image: "registry.k8s.io/kube-proxy:v1.36.3"`, `image: k, resources: {limits: {cpu: 100m}}`), Warn, "DaemonSet kube-system/kube-proxy | daemonsets.apps | kube-proxy: limits.cpu 100m"},
	{"MT-09", "an old kernel", in("6.1.0-40-amd64", "5.4.0-26-generic"), Warn, "Node n2 | nodes | kernel 5.4.0-26-generic"},
	{"GW-01", "not programmed", in(`{type: Programmed, status: "True"}], listeners`, `{type: Programmed, status: "False", reason: AddressNotUsable}], listeners`), Fail, "Gateway edge/edge | gateways.gateway.networking.k8s.io | Programmed is False: AddressNotUsable"},
	{"GW-01", "a listener", in(`{name: http, conditions: [{type: Programmed, status: "True"}`, `{name: http, conditions: [{type: ResolvedRefs, status: "False", message: "no such Secret"}`), Fail, "listener http: ResolvedRefs is False: no such Secret"},
	{"GW-02", "no class", in("gatewayClassName: envoy", "gatewayClassName: nginx"), Fail, "no GatewayClass nginx"},
	{"GW-02", "refused", in(`status: {conditions: [{type: Accepted, status: "True"}]}`, `status: {conditions: [{type: Accepted, status: "False"}]}`), Fail, "GatewayClass envoy: Accepted is False"},
	{"GW-03", "no Service", in("backendRefs: [{name: web, port: 80}", "backendRefs: [{name: wab, port: 80}"), Fail, "HTTPRoute shop/web | services | no Service shop/wab"},
	{"GW-04", "no grant", in("namespace: shop}], to:", "namespace: other}], to:"), Fail, "to Service kube-system/kube-dns, and no ReferenceGrant there"},
	{"GW-05", "no Gateway", in("parentRefs: [{name: edge, namespace: edge}]", "parentRefs: [{name: edge}]"), Fail, "no Gateway shop/edge"},
	{"GW-05", "refused", in(`parentRef: {name: edge}, conditions: [{type: Accepted, status: "True"}`, `parentRef: {name: edge}, conditions: [{type: Accepted, status: "False", reason: NotAllowedByListeners}`), Fail, "by edge: Accepted is False: NotAllowedByListeners"},
	{"IN-01", "it runs", more(nginxRuns), Warn, "Deployment ingress-nginx/nginx | deployments.apps | registry.k8s.io/ingress-nginx/controller:v1.13.0"},
	{"IN-02", "off", in(`upstream-keepalive-connections: "320"`, `upstream-keepalive-connections: "0"`), Warn, "ConfigMap ingress-nginx/ingress-nginx-controller"},
	{"IN-03", "its example", more(fmt.Sprintf(netPod, "ingress-nginx", "sysctl -w net.core.somaxconn=65535; sysctl -w net.ipv4.ip_local_port_range='1024 65000'")), Warn, "tune: ip_local_port_range 1024 65000"},
	{"IN-04", "an hour", all(more(nginxRuns), more(fmt.Sprintf(balanced, "3600"))), Warn, "the balancer's idle timeout is 3600 s, and keep-alive of ingress-nginx 75 s"},
	{"IN-05", "an own manifest", more(strings.Replace(nginxRuns, "terminationGracePeriodSeconds: 300, ", "", 1)), Warn, "terminationGracePeriodSeconds: 30, and worker-shutdown-timeout 240 s"},
	{"IN-06", "no class", in("ingressClassName: edge", "ingressClassName: nginx"), Warn, `Ingress shop/web | ingressclasses.networking.k8s.io | ingressClassName "nginx"`},
	{"IN-07", "no Service", in("backend: {service: {name: web,", "backend: {service: {name: wab,"), Warn, "Ingress shop/web | services | no Service wab"},
}

// clusterCalm look like faults and are none.
var clusterCalm = []story{
	{id: "PX-01", what: "at the threshold", change: all(in("mode: nftables", "mode: iptables"), many(998, manyOfThem))},
	{id: "PX-01", what: "nftables", change: many(1200, manyOfThem)},
	{id: "PX-03", what: "iptables", change: all(in("mode: nftables", "mode: iptables"), in("6.1.0-40-amd64", "5.10.0-30-amd64"))},
	{id: "PX-04", what: "iptables", change: all(in("mode: nftables", "mode: iptables"), in("nodePortAddresses: [192.0.2.0/24]", ""))},
	{id: "PX-10", what: "by the node's range", change: in("clusterCIDR: 10.244.0.0/16", "detectLocalMode: NodeCIDR")},
	{id: "PX-12", what: "one is ready", change: in("nodeName: n1, conditions: {ready: true}, targetRef: {kind: Pod, name: web", "nodeName: n1, conditions: {ready: false}, targetRef: {kind: Pod, name: web")},
	{id: "PX-12", what: "a manifest, of which nothing runs", change: more(`{apiVersion: v1, kind: Service, metadata: {name: new, namespace: shop}, spec: {clusterIP: 10.96.0.99, selector: {app: new}}}`)},
	{id: "PX-12", what: "an ExternalName", change: more(`{apiVersion: v1, kind: Service, metadata: {name: out, namespace: shop, uid: u}, spec: {type: ExternalName, selector: {app: new}}}`)},
	{id: "PX-13", what: "Local", change: more(fmt.Sprintf(loadBal, ", uid: u", "Local", "{ip: 198.51.100.7}"))},
	{id: "PX-18", what: "the defaults", change: in("mode: nftables", "mode: iptables")},
	{id: "PX-20", what: "the name is there", change: all(in("targetPort: 8080", "targetPort: http"), in("name: web, readinessProbe: {}, ", "name: web, readinessProbe: {}, ports: [{name: http, containerPort: 8080}], "))},
	{id: "PX-20", what: "no pods at all", change: all(in("targetPort: 8080", "targetPort: http"), in("labels: {app: web}}", "labels: {app: wab}}"))},
	{id: "PX-21", what: "one on each node", change: in("type: NodePort, ", "type: NodePort, internalTrafficPolicy: Local, ")},
	{id: "PX-22", what: "a manifest", change: more(fmt.Sprintf(loadBal, "", "Local", ""))},
	{id: "PX-22", what: "it has one", change: more(fmt.Sprintf(loadBal, ", uid: u", "Local", "{hostname: a.example}"))},
	{id: "PX-23", what: "no pods of kube-proxy", change: all(in(cilium, replaced), in("status: {desiredNumberScheduled: 2, numberReady: 2}", "status: {}"))},
	{id: "CT-14", what: "an older Kubernetes", change: all(in(`cpu: "4"`, `cpu: "64"`), in("v1.36.3", "v1.35.1"))},
	{id: "CT-14", what: "left alone", change: all(in(`cpu: "4"`, `cpu: "64"`), in("maxPerCore: 32768", "maxPerCore: 0"))},
	{id: "DN-02", what: "one node", change: all(in("kind: Node\nmetadata: {name: n2", "kind: Nothing\nmetadata: {name: n2"), in("{ip: 10.244.1.2}], conditions: [{type: Ready, status: \"True\"}]", "{ip: 10.244.1.2}]"))},
	{id: "DN-21", what: "one", change: all(more(dnsDeployment), more(fmt.Sprintf(dnsAutoscaler, "dns")))},
	{id: "DN-21", what: "one of something else", change: all(more(dnsDeployment), more(strings.Replace(fmt.Sprintf(dnsAutoscaler, "web"), "name: coredns", "name: web", 1)), more(proportional))},
	{id: "DN-13", what: "another server block, as in the manual of forward", change: in("forward . /etc/resolv.conf", "forward . 127.0.0.1:5301 127.0.0.1:5302")},
	{id: "DN-13", what: "a server outside", change: in("forward . /etc/resolv.conf", "forward . 192.0.2.53 tls://198.51.100.1")},
	{id: "DN-15", what: "verified", change: all(in("        cache 30\n", "        cache 30\n        autopath @kubernetes\n"), in("pods insecure", "pods verified"))},
	{id: "DN-17", what: "a system's pod", change: more(fmt.Sprintf(netPod, "kube-system", "true"))},
	{id: "DN-18", what: "a cache on each node", change: in("clusterDNS: [10.96.0.10]", "clusterDNS: [169.254.20.10]")},
	{id: "DN-18", what: "a cache at another address", change: in("clusterDNS: [10.96.0.10]", "clusterDNS: [169.254.25.10]")},
	{id: "DN-19", what: "with a policy", change: all(in(cilium, replaced), in("name: kube-proxy, namespace: kube-system, uid: u}\nspec: {template", "name: node-local-dns, namespace: kube-system, uid: u}\nspec: {template"), more(`{apiVersion: cilium.io/v2, kind: CiliumLocalRedirectPolicy, metadata: {name: dns, namespace: kube-system}}`))},
	{id: "DN-20", what: "errors only", change: in("        errors\n", "        errors\n        log . {\n            class error\n        }\n")},
	{id: "CN-03", what: "by eBPF", change: in(cilium, replaced+`, enable-bpf-masquerade: "true"`)},
	{id: "CN-05", what: "a pool that holds the nodes' ranges", change: more(fmt.Sprintf(pool, "10.244.0.0/16"))},
	{id: "CN-06", what: "pods of another range", change: in("podCIDR: 10.244.0.0/24, podCIDRs: [10.244.0.0/24]", "podCIDR: 10.99.0.2/31")},
	{id: "CN-09", what: "reflectors and Typha", change: all(more(calico), more(fmt.Sprintf(pool, "10.244.0.0/16")), many(100, "{apiVersion: v1, kind: Node, metadata: {name: m%d}}"),
		more(`{apiVersion: crd.projectcalico.org/v1, kind: BGPConfiguration, metadata: {name: default}, spec: {nodeToNodeMeshEnabled: false}}`),
		more(`{apiVersion: apps/v1, kind: Deployment, metadata: {name: calico-typha, namespace: kube-system}}`))},
	{id: "CN-11", what: "all ports", change: in("    ports: [{protocol: UDP, port: 53}, {protocol: TCP, port: 53}]\n", "")},
	{id: "CN-11", what: "a second policy allows it", change: all(in("ports: [{protocol: UDP, port: 53}, {protocol: TCP, port: 53}]", "ports: [{port: 443}]"),
		more(`{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: dns, namespace: shop}, spec: {podSelector: {}, policyTypes: [Egress], egress: [{ports: [{protocol: UDP, port: 1, endPort: 99}, {port: dns-tcp}]}]}}`))},
	{id: "CN-11", what: "incoming only", change: in("policyTypes: [Egress]", "policyTypes: [Ingress]")},
	{id: "CN-11", what: "the range of pods", change: in("to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}, podSelector: {matchLabels: {k8s-app: kube-dns}}}]", "to: [{ipBlock: {cidr: 10.244.0.0/16}}]")},
	{id: "CN-12", what: "it is set", change: all(in("public-ip: 192.0.2.2}, labels: {topology.kubernetes.io/zone: a}", "public-ip: 192.0.2.2}, labels: {topology.kubernetes.io/zone: b}"), in("spec: {type: ", "spec: {trafficDistribution: PreferClose, type: "))},
	{id: "CN-15", what: "Canal", change: all(in(`, {name: kube-network-policies, image: "kube-network-policies:v0.9"}`, ""), more(strings.Replace(calico, "calico-node", "canal", 1)))},
	{id: "CN-17", what: "time is left", change: in("sleep 5", "sleep 29")},
	{id: "CN-20", what: "pods of the node's network", change: more(`{apiVersion: v1, kind: Pod, metadata: {name: p, namespace: kube-system}, spec: {hostNetwork: true}, status: {phase: Running, podIPs: [{ip: 192.0.2.1}]}}`)},
	{id: "CN-20", what: "one that has ended", change: all(in("podIPs: [{ip: 10.244.1.3}]", "podIPs: [{ip: 10.244.0.3}]"), in("status: {phase: Running, podIPs: [{ip: 10.244.0.3}]", "status: {phase: Succeeded, podIPs: [{ip: 10.244.0.3}]"))},
	{id: "CN-20", what: "one that ends", change: all(in("podIPs: [{ip: 10.244.1.3}]", "podIPs: [{ip: 10.244.0.3}]"), in("name: web-1, namespace: shop, uid: u, labels: {app: web}", "name: web-1, namespace: shop, uid: u, deletionTimestamp: \"2026-01-01T00:00:00Z\", labels: {app: web}"))},
	{id: "CN-21", what: "another plug-in", change: all(in("spec: {podCIDR: 10.244.1.0/24, podCIDRs: [10.244.1.0/24]}", "spec: {}"), in("net-conf.json:", "other.json:"))},
	{id: "GW-03", what: "another kind of backend", change: in("backendRefs: [{name: web, port: 80}", "backendRefs: [{kind: ServiceImport, name: wab, port: 80}")},
	{id: "GW-04", what: "all Services", change: in(`kind: Service, name: kube-dns}]`, `kind: Service}]`)},
	{id: "IN-01", what: "F5's", change: more(strings.Replace(nginxRuns, "ingress-nginx/controller", "nginx/nginx-ingress", 1))},
	{id: "IN-03", what: "a network of its own", change: more(strings.Replace(fmt.Sprintf(netPod, "ingress-nginx", "sysctl -w net.ipv4.ip_local_port_range='1024 65000'"), "hostNetwork: true", "hostNetwork: false", 1))},
	{id: "IN-04", what: "a minute", change: all(more(nginxRuns), more(fmt.Sprintf(balanced, "60")))},
	{id: "IN-05", what: "as its chart", change: more(nginxRuns)},
	{id: "IN-06", what: "the default class", change: all(in("ingressClassName: edge, ", ""), in("kind: IngressClass\nmetadata: {name: edge, uid: u}", "kind: IngressClass\nmetadata: {name: edge, annotations: {ingressclass.kubernetes.io/is-default-class: \"true\"}}"))},
}

// A configuration that cannot be read is said so, with its ConfigMap.
func TestBrokenConfiguration(t *testing.T) {
	for _, row := range []struct {
		id     string
		change func(*world)
		says   string
	}{
		{"PX-17", in("kind: KubeProxyConfiguration\n", "kind: KubeProxyConfiguration\n    mode: [\n"), "ConfigMap kube-system/kube-proxy"},
		{"PX-17", in("kind: KubeProxyConfiguration\n", "kind: Other\n"), "there is no KubeProxyConfiguration among them"},
		{"CN-22", in(`{"Network"`, `{Network`), "net-conf.json of kube-flannel/kube-flannel-cfg"},
		{"DN-05", in("Corefile: |", "Other: |"), "there is no Corefile in a ConfigMap coredns"},
		{"DN-02", in("k8s-app: kube-dns}}\nspec: {nodeName", "k8s-app: names}}\nspec: {nodeName"), "it is not known who serves names"},
		{"DN-18", in("name: kube-dns, namespace: kube-system, uid: u, labels: {k8s-app: kube-dns}", "name: names, namespace: kube-system"), "there is no Service kube-dns"},
	} {
		w := healthy()
		row.change(w)
		results, _ := w.examine(t, one(t, row.id))
		if r := results[row.id]; r.Status != Skip || !strings.Contains(texts(r), row.says) {
			t.Errorf("%s is %s, and does not say %q:\n%s", row.id, r.Status, row.says, texts(r))
		}
	}
}

// Without a cluster its checks say what they lack, and each names what it reads.
func TestWithoutCluster(t *testing.T) {
	for _, c := range Checks() {
		if !c.NeedsCluster() || c.Scope != Whole && !c.Sends() {
			continue
		}
		if r := Run(&Facts{}, []Check{c})[0]; r.Status != Skip || !strings.Contains(texts(r), "say --source kube:KUBECONFIG") {
			t.Errorf("%s is %s:\n%s", c.ID, r.Status, texts(r))
		}
	}
}

func TestReadClusterEndsWhenItIsTold(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("enough"))
	if _, err := ReadCluster(ctx, healthy(), one(t, "PX-12"), io.Discard); err == nil || !strings.Contains(err.Error(), "enough") {
		t.Error(err)
	}
}

func TestPaths(t *testing.T) {
	want := map[string]string{Pods: "/api/v1/pods", DaemonSets: "/apis/apps/v1/daemonsets", ReferenceGrants: "/apis/gateway.networking.k8s.io/v1beta1/referencegrants"}
	for _, r := range resources {
		if path, asked := want[r.Name]; asked && r.Path() != path {
			t.Errorf("%s: %s", r.Name, r.Path())
		}
	}
}

func TestQuantities(t *testing.T) {
	for text, want := range map[string]float64{"64": 64, "500m": 0.5, "170Mi": 170 << 20, "1G": 1e9, "x": -1, "": -1} {
		got, ok := scalar(text).quantity()
		if !ok {
			got = -1
		}
		if got != want {
			t.Errorf("%q is %g, not %g", text, got, want)
		}
	}
}
