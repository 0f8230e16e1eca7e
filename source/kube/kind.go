package kube

import (
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/millrace/millrace/model"
	"github.com/millrace/millrace/source/cluster"
	"github.com/millrace/millrace/source/corefile"
)

// kind is one kind of objects as the API server is asked for it.
type kind struct {
	// resource is its name in paths and RBAC rules, "services".
	resource string
	// path leads to it below the address of a server.
	path string
	// object is its name in manifests, "Service".
	object string
	// labels and fields select the objects that are of use, at the server.
	labels, fields string
	// list makes an empty list of the kind.
	list func() runtime.Object
	// needed: without it nothing can be served.
	needed bool
	// always: there are some as soon as an API server is up.
	always bool
	// never is why a list of the kind is never empty; "" where it may be.
	never string
	// beside: a Snapshot is complete without it.
	beside bool
	// name is that of the one object that is asked for; the zero value is all.
	name model.Name
	// dns: it says how the DNS servers are configured.
	dns bool
	// may: where the API server forbids to read it, a Snapshot is complete without it.
	may bool
}

// title is what a kind is called in messages.
func (k kind) title() string {
	if k.name == (model.Name{}) {
		return k.resource
	}
	return k.resource + " " + k.name.String()
}

// oneConfigMap is the kind of one ConfigMap.
func oneConfigMap(name model.Name) kind {
	return kind{
		resource: "configmaps", path: "/api/v1/namespaces/" + name.Namespace + "/configmaps", object: "ConfigMap",
		fields: "metadata.name=" + name.Name,
		list:   func() runtime.Object { return &corev1.ConfigMapList{} },
		name:   name,
	}
}

// oneDeployment is the kind of one Deployment.
func oneDeployment(name model.Name) kind {
	return kind{
		resource: "deployments", path: "/apis/apps/v1/namespaces/" + name.Namespace + "/deployments", object: "Deployment",
		fields: "metadata.name=" + name.Name,
		list:   func() runtime.Object { return &appsv1.DeploymentList{} },
		name:   name,
	}
}

// kindsFor are the kinds that are watched for a node, or with the pods of all nodes.
//
// The selectors are kube-proxy's: a Service with the label service-proxy-name is
// another proxy's, and headless Services are for DNS, as are slices with the
// label headless: with names all of these are asked for, too. Slices without a Service
// are somebody else's private matter. With names also the configuration of CoreDNS is,
// with its Deployment, with masquerade that of ip-masq-agent, and with flannel those of
// flannel.
func kindsFor(settings Settings) []kind {
	node, names := settings.Node, settings.Names
	const ours = "!service.kubernetes.io/service-proxy-name"
	services, addressed, slices := ours, "spec.clusterIP!="+corev1.ClusterIPNone, discoveryv1.LabelServiceName+",!"+corev1.IsHeadlessService+","+ours
	if names {
		services, addressed, slices = "", "", discoveryv1.LabelServiceName
	}
	onNode := ""
	if node != "" {
		onNode = "spec.nodeName=" + node
	}
	all := []kind{
		{
			resource: "services", path: "/api/v1/services", object: "Service",
			labels: services,
			fields: addressed,
			list:   func() runtime.Object { return &corev1.ServiceList{} },
			needed: true, always: true,
			never: "every API server makes the Service default/kubernetes when it starts",
		},
		{
			resource: "endpointslices", path: "/apis/discovery.k8s.io/v1/endpointslices", object: "EndpointSlice",
			labels: slices,
			list:   func() runtime.Object { return &discoveryv1.EndpointSliceList{} },
			needed: true,
			never:  "the API server itself is an endpoint of default/kubernetes",
		},
		{
			resource: "nodes", path: "/api/v1/nodes", object: "Node",
			list:  func() runtime.Object { return &corev1.NodeList{} },
			never: "this agent runs on one",
		},
		{
			resource: "pods", path: "/api/v1/pods", object: "Pod",
			fields: onNode,
			list:   func() runtime.Object { return &corev1.PodList{} },
		},
	}
	if names {
		for _, one := range []kind{oneConfigMap(corefile.ConfigMap), oneConfigMap(corefile.Custom), oneDeployment(corefile.Deployment)} {
			one.beside, one.dns = true, true
			all = append(all, one)
		}
	}
	if settings.Masquerade {
		masquerade := oneConfigMap(cluster.MasqueradeConfigMap)
		masquerade.may = true
		all = append(all, masquerade)
	}
	if settings.Flannel {
		for _, name := range cluster.FlannelConfigMaps {
			flannel := oneConfigMap(name)
			flannel.may = true
			all = append(all, flannel)
		}
	}
	return all
}
